"""A line less in params.yaml: what it leaves is removed, and nothing that is not ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from record_factory import benchmark_record, fetch_record, quantize_record

from pipelines import declaration, records, retire
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MODEL = "tiny-llama"
GONE = "Q2_K"


@pytest.fixture(name="at")
def _at(checkout: Path) -> Layout:
    """A checkout in which every declared quant left its files, and one quant is gone since."""
    at = Layout(checkout)
    records.write(at.model_record("fetch", MODEL), fetch_record())
    for type_ in ("Q8_0", GONE):
        write_quant(at, MODEL, type_)
    at.params.write_text(re.sub(rf"\n  {MODEL}-{GONE}:.*", "", at.params.read_text()))
    return at


def write_quant(at: Layout, model: str, type_: str) -> None:
    """Write what the stages leave of one quant."""
    records.write(at.quant_record("quantize", model, type_), quantize_record(type_))
    records.write(at.quant_record("benchmark", model, type_), benchmark_record(type_))
    gguf = at.gguf(model, f"{model}-{type_}")
    gguf.parent.mkdir(parents=True, exist_ok=True)
    gguf.write_bytes(b"GGUF" + bytes(2 << 20))
    gguf.chmod(0o444)


def write_model(at: Layout, model: str) -> None:
    """Write what the stages leave of one model, its quant Q8_0 included."""
    write_quant(at, model, "Q8_0")
    for path in at.of_model(model):
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        else:
            path.mkdir(parents=True)
            (path / "file").write_text("x")


def run(at: Layout) -> list[str]:
    """Retire what the declaration of a checkout does not have."""
    return retire.retire(at, declaration.load(at.params))


def files(root: Path) -> set[str]:
    """Every file and link below results/ and work/."""
    tops = [root / "results", root / "work"]
    return {
        str(path.relative_to(root))
        for top in tops
        for path in top.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def test_a_quant_that_is_not_declared_leaves_nothing(at: Layout) -> None:
    """Its records and its GGUF are removed and named in one line; the other quants stay."""
    before = files(at.root)

    told = run(at)

    assert before - files(at.root) == {
        f"results/{MODEL}/quantize/{GONE}.json",
        f"results/{MODEL}/benchmark/{GONE}.json",
        f"work/{MODEL}/gguf/{MODEL}-{GONE}.gguf",
    }
    (line,) = told
    assert line.startswith(f"{MODEL}-{GONE} is not declared any more: removed ")
    assert all(name in line for name in before - files(at.root))
    assert "DVC's cache keeps the 2.0 MiB" in line
    assert run(at) == []


def test_of_named_models_only_their_own_quants_go(at: Layout) -> None:
    """What a job packs of a model holds no quant that it no longer has; the rest is left alone."""
    write_model(at, "old-model")
    before = files(at.root)
    declared = declaration.load(at.params)

    assert retire.retire(at, declared, only=["another"]) == []
    assert files(at.root) == before
    (line,) = retire.retire(at, declared, only=[MODEL])

    assert line.startswith(f"{MODEL}-{GONE} is not declared any more")
    assert any("old-model" in name for name in files(at.root))


def test_a_model_that_is_not_declared_leaves_nothing(at: Layout) -> None:
    """All that its stages wrote is removed, its folders too."""
    run(at)
    before = files(at.root)
    write_model(at, "old-model")

    told = run(at)

    assert files(at.root) == before
    assert not (at.root / "results/old-model").exists()
    assert not (at.root / "work/old-model").exists()
    assert [line.partition(" ")[0] for line in told] == ["old-model", "old-model-Q8_0"]


def test_what_was_released_stays_on_record(at: Layout) -> None:
    """The last release of a model that is gone, and who moved what when, are no left-overs."""
    write_model(at, "old-model")
    kept = (at.release("old-model"), at.ledger("old-model"))
    for path in kept:
        path.write_text("a release")

    told = run(at)

    assert all(path.read_text() == "a release" for path in kept)
    assert not at.model_record("publish", "old-model").exists()
    assert not at.observed("old-model").exists()
    assert any("results/old-model/publish.json" in line for line in told)
    assert run(at) == []


def test_what_only_the_probe_wrote_of_a_model_goes_with_it(at: Layout) -> None:
    """A model that was declared for a moment leaves nothing either."""
    run(at)
    path = at.observed("old-model")
    path.parent.mkdir(parents=True)
    path.write_text("{}")

    (line,) = run(at)

    assert not path.exists()
    assert line.startswith("old-model is not declared any more: removed ")


def test_what_a_stage_did_not_write_stays(at: Layout) -> None:
    """Files of other names, and a folder of the operator's beside those of models, are kept."""
    run(at)
    write_model(at, "old-model")
    kept = {
        f"results/{MODEL}/benchmark/{GONE}-notes.json",
        f"results/{MODEL}/benchmark/Q9_X.json",
        f"results/{MODEL}/quantize/{GONE}.md",
        "results/old-model/README.md",
        "results/overhead.json",
        "work/old-model/gguf/by-hand.gguf",
    }
    for name in kept:
        (at.root / name).parent.mkdir(parents=True, exist_ok=True)
        (at.root / name).write_text("mine")
    (at.root / "results/notes").mkdir()

    run(at)

    assert kept <= files(at.root)
    assert (at.root / "results/notes").is_dir()
    assert "results/old-model/fetch.json" not in files(at.root)


def test_a_thing_of_another_kind_stays_and_is_named(
    at: Layout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder or a link where a stage writes a file is left alone, and so is what it points to."""
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("precious")
    record = at.quant_record("quantize", MODEL, GONE)
    record.unlink()
    record.symlink_to(elsewhere)
    folder = at.quant_record("benchmark", MODEL, GONE)
    folder.unlink()
    folder.mkdir()
    gguf = at.gguf(MODEL, f"{MODEL}-{GONE}")
    gguf.unlink()
    gguf.symlink_to(elsewhere)

    told = run(at)

    said = capsys.readouterr().err
    assert told == []
    assert record.is_symlink()
    assert folder.is_dir()
    assert gguf.is_symlink()
    assert elsewhere.read_text() == "precious"
    assert f"{record} stays: it is a symbolic link" in said
    assert f"{folder} stays: it is no file" in said


def test_nothing_is_removed_through_a_linked_folder(at: Layout, tmp_path: Path) -> None:
    """A folder of GGUFs that lies elsewhere is somebody else's."""
    there = tmp_path / "there"
    (at.root / "work" / MODEL / "gguf").rename(there)
    (at.root / "work" / MODEL / "gguf").symlink_to(there)

    run(at)

    assert (there / f"{MODEL}-{GONE}.gguf").exists()
    assert not at.quant_record("quantize", MODEL, GONE).exists()


def test_a_link_into_the_cache_is_removed_and_the_cache_is_not(at: Layout) -> None:
    """Where DVC links a GGUF from its cache, the link goes and the blob stays for `dvc gc`."""
    blob = at.root / ".dvc/cache/files/md5/00/11"
    blob.parent.mkdir(parents=True)
    gguf = at.gguf(MODEL, f"{MODEL}-{GONE}")
    gguf.rename(blob)
    gguf.symlink_to(os.path.relpath(blob, gguf.parent))

    run(at)

    assert not os.path.lexists(gguf)
    assert blob.read_bytes()[:4] == b"GGUF"


def test_a_folder_of_results_alone_makes_no_model(at: Layout) -> None:
    """Folders that no stage wrote anything of ours into are not even mentioned."""
    run(at)
    for name in ("results/hosts/a.json", "work/downloads/b.bin", "work/logs/x.log"):
        (at.root / name).parent.mkdir(parents=True, exist_ok=True)
        (at.root / name).write_text("{}")
    before = files(at.root)

    assert run(at) == []
    assert files(at.root) == before


# --- dvc.lock ---------------------------------------------------------------------------------


def lock_of(names: list[str]) -> dict[str, Any]:
    """Compose a dvc.lock of stages without inputs."""
    return {
        "schema": "2.0",
        "stages": {
            name: {"cmd": f"python -m pipelines {name.replace('@', ' ')}",
                   "outs": [{"path": f"x/{name}", "hash": "md5", "md5": "0" * 32, "size": 1}]}
            for name in names
        },
    }  # fmt: skip


def test_entries_of_dvc_lock_go_and_no_other_byte_of_it(at: Layout) -> None:
    """Entries of what is gone are taken out; those of other stages stay as DVC wrote them."""
    kept = [f"quantize@{MODEL}-Q8_0", f"fetch@{MODEL}", f"mine@{MODEL}-{GONE}", "report"]
    gone = [f"quantize@{MODEL}-{GONE}", f"benchmark@{MODEL}-{GONE}", "fetch@old-model"]
    lock = at.root / "dvc.lock"
    dump(lock, lock_of(kept))
    wanted = lock.read_bytes()
    dump(lock, lock_of([kept[0], *gone, *kept[1:]]))

    told = run(at)

    assert lock.read_bytes() == wanted
    assert "and 2 entries of dvc.lock" in next(line for line in told if GONE in line)
    assert any("old-model" in line and "1 entry of dvc.lock" in line for line in told)


def dump(lock: Path, content: dict[str, Any]) -> None:
    """Write a dvc.lock with DVC's own writer."""
    from dvc.utils.serialize import dumps_yaml  # noqa: PLC0415 - heavy

    lock.write_text(dumps_yaml(content))


def test_dvc_reads_what_is_left(at: Layout) -> None:
    """After an entry is taken out, `dvc status` accepts the file."""
    lock = at.root / "dvc.lock"
    dump(lock, lock_of([f"quantize@{MODEL}-{GONE}", f"fetch@{MODEL}"]))

    run(at)

    assert list(yaml.safe_load(lock.read_text())["stages"]) == [f"fetch@{MODEL}"]
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", f"fetch@{MODEL}"],
        cwd=at.root, env={**os.environ, "DVC_NO_ANALYTICS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"fetch@{MODEL}" in json.loads(done.stdout)


def test_a_dvc_lock_that_is_held_stays_and_the_rest_goes(at: Layout) -> None:
    """While somebody else's DVC holds the checkout, its file is not touched."""
    lock = at.root / "dvc.lock"
    dump(lock, lock_of([f"quantize@{MODEL}-{GONE}"]))
    before = lock.read_bytes()
    (at.root / ".dvc/tmp").mkdir(exist_ok=True)
    code = (
        "import zc.lockfile, sys; l = zc.lockfile.LockFile('.dvc/tmp/lock'); print('held');"
        "sys.stdout.flush(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=at.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        told = run(at)
        holder.communicate()

    assert lock.read_bytes() == before
    assert len(told) == 1
    assert "dvc.lock" not in told[0]


# --- the command ------------------------------------------------------------------------------


def test_everything_that_the_graph_writes_is_retired(checkout: Path) -> None:
    """No output of a stage in dvc.yaml is missing from what is removed with a model or a quant."""
    graph = yaml.safe_load((checkout / "dvc.yaml").read_text())["stages"]
    at = Layout()
    spelled = {str(path) for path in (*at.of_model("M"), *at.of_quant("M", "K", "T"))}
    written = set()
    for stage in graph.values():
        if stage.get("foreach") in {"${models}", "${quants}"}:
            key = "M" if stage["foreach"] == "${models}" else "K"
            for kind in ("outs", "metrics", "plots"):
                for entry in stage["do"].get(kind, []):
                    (path,) = entry if isinstance(entry, dict) else (entry,)
                    path = path.replace("${key}", key).replace("${item.model}", "M")
                    written.add(path.replace("${item.type}", "T"))

    assert written
    assert written <= spelled


@pytest.mark.toolchain
@pytest.mark.usefixtures("tools")
def test_fleet_repro_retires_and_says_so(
    at: Layout, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`fleet repro` of everything retires before DVC starts; one of a model leaves the rest."""
    gguf = at.gguf(MODEL, f"{MODEL}-{GONE}")
    # So that the run ends where the work would begin.
    (at.root / "dvc.yaml").write_text("stages: {}\nnonsense: 1\n")

    named = fleet("repro", MODEL, cwd=at.root)
    kept = gguf.exists()
    whole = fleet("repro", cwd=at.root)

    assert kept
    assert "retired" not in named.stderr
    assert not gguf.exists()
    assert f"retired: {MODEL}-{GONE} is not declared any more" in whole.stderr
