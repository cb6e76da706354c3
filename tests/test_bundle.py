"""A bundle: what leaves a measuring machine, and a reader that takes nothing from a stranger."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from bundle_factory import (
    FACTS,
    HEAD,
    HOST,
    MODEL,
    ROOT,
    TWIN,
    bundle_of,
    commit,
    edited,
    fleet,
    plan_of,
    with_twin,
)
from sample import SAMPLE

from pipelines import atomic, bundle, bundle_checks, declaration, hashing, lock_entries, machine
from pipelines.bundle import BundleError
from pipelines.layout import Layout

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path


RECORD = f"results/{MODEL}/choice.json"
ENTRY = f"choose@{MODEL}"


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet as git holds it."""
    return fleet(tmp_path / "fork")


@pytest.fixture
def data() -> dict[str, Any]:
    """The JSON of a good bundle, to spoil."""
    found: dict[str, Any] = json.loads(bundle_of(Layout(SAMPLE)).model_dump_json())
    return found


def refused(data: object, path: Path) -> str:
    """Return why a bundle is refused."""
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(BundleError) as caught:
        bundle.read(path)
    return caught.value.message


# --- packing ----------------------------------------------------------------------------------


def test_the_records_of_git_are_a_bundle_that_agrees_with_itself(at: Layout) -> None:
    """What the embedded model left in git is whole: nothing missing, nothing of other bytes."""
    declared = declaration.load(at.params)

    found = bundle.from_git(at, declared, MODEL, host=HOST, head=HEAD)

    assert bundle.read(found.model_dump_json().encode()) == found
    assert list(bundle_checks.agreement(found, declared, measured=False)) == []
    assert len(found.ggufs) == 5
    assert found.primary


def test_a_run_leaves_one_small_file_for_each_model(
    at: Layout, tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`fleet bundle` takes two models in one word, as an action passes them."""
    with_twin(at)
    head = commit(at.root)

    done = fleet("bundle", f"{MODEL} {TWIN}", "--host", HOST, "--out", "../out", cwd=at.root)

    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"bundle-{HOST}-{MODEL}.json", f"bundle-{HOST}-{TWIN}.json"}
    found = bundle.read(tmp_path / "out" / f"bundle-{HOST}-{MODEL}.json")
    assert found.head == head
    assert "results/tiny-llama/release.json" not in found.files
    assert not any("ledger" in name or "publish" in name for name in found.files)


def test_a_failed_chain_says_what_there_is_and_why_there_is_no_more(at: Layout) -> None:
    """The gate hears the cause from the bundle, not only that a job was red."""
    took = {"schema_version": 1, "stage": "times", "wall_s": {f"fetch@{MODEL}": 2.0}}
    cause = "llama-quantize was killed: not enough memory"
    took["failed"] = {f"quantize@{MODEL}-Q2_K": cause, f"fetch@{TWIN}": "another model"}
    atomic.write_json(at.root / "work/times.json", took)
    (at.root / f"results/{MODEL}/quantize/Q2_K.json").unlink()
    declared = declaration.load(at.params)

    found = bundle.measured(at, declared, MODEL, host=HOST, head=HEAD, remote=None)

    assert found.times_s == {f"fetch@{MODEL}": 2.0}
    assert f"quantize@{MODEL}-Q2_K failed: {cause}" in found.failures
    assert not any(TWIN in text for text in found.failures)
    told = list(bundle_checks.agreement(found, declared, measured=True))
    assert any("quantize/Q2_K.json, which" in text for text in told)


@pytest.mark.parametrize(
    ("codes", "again"),
    [
        ({f"fetch@{MODEL}": 75}, True),
        ({f"fetch@{MODEL}": 75, f"verify@{MODEL}": 5}, False),
        ({f"fetch@{MODEL}": 1}, False),
        # Of another model, or of a run before.
        ({f"fetch@{TWIN}": 75}, False),
        ({}, False),
    ],
)
def test_only_what_passes_by_itself_asks_for_another_run(
    at: Layout, codes: dict[str, int], *, again: bool
) -> None:
    """The Hub that does not answer is nobody's failure; a chain that also broke is one."""
    names = (f"fetch@{MODEL}", f"convert@{MODEL}", f"verify@{MODEL}", f"fetch@{TWIN}")
    took = {"schema_version": 1, "stage": "times", "codes": codes}
    atomic.write_json(at.root / "work/times.json", took | {"failed": dict.fromkeys(names, "why")})
    for path in (at.root / "results" / MODEL / "quantize").glob("*.json"):
        path.unlink()
    declared = declaration.load(at.params)

    found = bundle.measured(at, declared, MODEL, host=HOST, head=HEAD, remote=None)

    assert found.failures
    assert found.again is again


def test_a_gguf_that_is_not_the_measured_one_is_said(at: Layout) -> None:
    """A file that was exchanged after the benchmark is not what was benchmarked."""
    declared = declaration.load(at.params)
    good = bundle.from_git(at, declared, MODEL, host=HOST, head=HEAD)
    for gguf in good.ggufs:
        path = at.gguf(MODEL, gguf.name.removesuffix(".gguf"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(gguf.size_bytes)

    found = bundle.measured(at, declared, MODEL, host=HOST, head=HEAD, remote=None)

    assert [text for text in found.failures if "its digest is another" in text] == list(
        found.failures
    )
    assert len(found.failures) == len(good.ggufs)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["tiny-lama", "--host", "local"], 'did you mean "tiny-llama"'),
        ([MODEL, "--host", "locale"], 'did you mean "local"'),
    ],
)
def test_what_is_not_declared_is_no_bundle(
    at: Layout,
    fleet: Callable[..., subprocess.CompletedProcess[str]],
    words: list[str],
    why: str,
) -> None:
    """A slip of the finger is an error of the declaration, and nothing is written."""
    done = fleet("bundle", *words, "--out", "out", cwd=at.root)

    assert done.returncode == 2
    assert why in done.stderr
    assert not (at.root / "out").exists()


def test_a_plan_that_asks_for_something_else_is_not_bundled(
    at: Layout, tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The commit of a bundle is that of the plan; so the plan has to ask for it."""
    with_twin(at)
    (tmp_path / "plan.json").write_text(plan_of(at, (TWIN, HOST)).model_dump_json())
    argv = ("--host", HOST, "--out", "../out", "--plan", "../plan.json")

    asked = fleet("bundle", TWIN, *argv, cwd=at.root)
    other = fleet("bundle", MODEL, *argv, cwd=at.root)
    at.params.write_text(at.params.read_text() + "# edited since\n")
    edited_since = fleet("bundle", TWIN, *argv, cwd=at.root)

    assert asked.returncode == 0, asked.stderr
    assert bundle.read(tmp_path / "out" / f"bundle-{HOST}-{TWIN}.json").head == HEAD
    assert (other.returncode, "does not ask for" in other.stderr) == (2, True)
    assert (edited_since.returncode, "another params.yaml" in edited_since.stderr) == (2, True)


def test_ggufs_go_to_the_default_remote_and_its_absence_is_a_notice(
    at: Layout, tmp_path: Path, fleet: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """`--push` sends exactly the declared GGUFs and the importance matrix, by the real DVC."""
    (at.root / ".dvc").mkdir()
    remote = tmp_path / "remote"
    told = f"[core]\n    remote = store\n['remote \"store\"']\n    url = {remote}\n"
    (at.root / ".dvc/config").write_text(told)
    shutil.copy(ROOT / ".gitignore", at.root)
    commit(at.root)
    md5 = _cached(at)

    done = fleet("bundle", MODEL, "--host", HOST, "--out", "out", "--push", cwd=at.root)

    assert done.returncode == 0, done.stderr
    found = bundle.read(at.root / f"out/bundle-{HOST}-{MODEL}.json")
    assert found.remote == "store"
    sent = {path.parent.name + path.name for path in remote.rglob("*") if path.is_file()}
    assert sent == {md5}

    (at.root / ".dvc/config").write_text(told.replace(str(remote), "ssh://nobody.invalid/x"))
    done = fleet("bundle", MODEL, "--host", HOST, "--out", "out", "--push", cwd=at.root)

    assert done.returncode == 8
    assert "the remote store of DVC did not take tiny-llama-Q2_K.gguf" in done.stderr
    assert bundle.read(at.root / f"out/bundle-{HOST}-{MODEL}.json").remote is None

    (at.root / ".dvc/config").write_text("")
    done = fleet("bundle", MODEL, "--host", HOST, "--out", "out", "--push", cwd=at.root)

    assert done.returncode == 0, done.stderr
    assert "DVC has no default remote" in done.stderr
    assert bundle.read(at.root / f"out/bundle-{HOST}-{MODEL}.json").remote is None


def _cached(at: Layout) -> str:
    """Put one small GGUF where `quantize` leaves it, and into DVC's cache; return its md5."""
    key = f"{MODEL}-Q2_K"
    path = at.gguf(MODEL, key)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF of a test")
    md5 = hashing.digest(path).md5
    cached = at.root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(path.read_bytes())
    lock = (at.root / "dvc.lock").read_text()
    entries = lock_entries.parsed(lock)
    for out in entries[f"quantize@{key}"]["outs"]:
        if out["path"].endswith(".gguf"):
            out.update({"md5": md5, "size": path.stat().st_size})
    (at.root / "dvc.lock").write_text(lock_entries.merged(lock, entries))
    return md5


# --- reading what a stranger wrote ------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        f"results/{MODEL}/ledger.jsonl",
        f"results/{MODEL}/release.json",
        f"results/{MODEL}/publish.json",
        f"results/{MODEL}/../twin/choice.json",
        f"results/{MODEL}//choice.json",
        f"results/./{MODEL}/choice.json",
        f"/results/{MODEL}/choice.json",
        f"results/{MODEL}/Choice.json",
        f"RESULTS/{MODEL}/choice.json",
        f"results/{MODEL}/choice.json\u202e",
        f"results/{MODEL}/quantize/Q9_Z.json",
        f"results/{MODEL}/on/edge/choice.json",
        f"results/{MODEL}/toolchain.json",
        f"results\\{MODEL}\\choice.json",
        "results/twin/choice.json",
        ".github/workflows/ci.yml",
        "dvc.lock",
        "",
    ],
)
def test_only_the_records_of_its_own_model_may_be_in_a_bundle(
    data: dict[str, Any], tmp_path: Path, path: str
) -> None:
    """No release, no ledger, nobody else's record, no path that leads elsewhere."""
    data["files"][path] = data["files"][RECORD]

    assert f"is no record that the stages of {MODEL} write" in refused(data, tmp_path / "b.json")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda _: "[" * 100_000, "nested deeper than"),
        (lambda _: "{}", "is no bundle"),
        (lambda _: "[1]", "is no bundle"),
        (lambda _: "not json", "is not JSON"),
        (lambda t: t.replace('"head":', '"head":"0","head":', 1), 'the key "head" is there twice'),
        (lambda t: t.replace("1.5", "NaN", 1), "NaN is not a number"),
        (lambda t: t.replace("1.5", "-Infinity", 1), "-Infinity is not a number"),
        (lambda t: t.replace("1.5", "1e999", 1), "1e999 is not a finite number"),
        (lambda t: t.replace("1.5", "1" * 5000, 1), "a number has 5,000 digits"),
        (lambda t: t.replace("1.5", "-1.5", 1), "cannot have taken -1.5 s"),
        (lambda t: t[:-1] + ',"spare":1}', '"spare"'),
        (lambda t: t.replace('"bundle"', '"gate"', 1), "is no bundle"),
        (lambda t: t[:-1] + " " * (1 << 20) + "}", "more than the 1,048,576 bytes"),
        (lambda t: t.replace('"host":"local"', '"host":"lo\\u0000cal"', 1), "control character"),
        (lambda t: t.replace('"host":"local"', '"host":"\\ud800"', 1), "surrogate"),
        (lambda t: t.replace('"host":"local"', '"host":"::error::"', 1), "is no bundle"),
        (lambda t: t.replace('"head":"aaa', '"head":"../', 1), "is no bundle"),
    ],
)  # fmt: skip
def test_a_bundle_that_is_none_is_named_with_its_cause(
    data: dict[str, Any], tmp_path: Path, spoil: Callable[[str], str], why: str
) -> None:
    """Size, depth, keys, numbers and characters are looked at before anything is believed."""
    text = json.dumps(data, separators=(",", ":"))

    told = refused(spoil(text), tmp_path / "b.json")

    assert told.startswith("b.json ")
    assert why in told


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" is there twice'),
        ('{"stage": "choose", "x": NaN}', "NaN is not a number"),
        ("[]", "is not a ChoiceRecord"),
        ("", "is not JSON"),
        ('{"a": "\\u001b[31m"}', "control character 0x1b"),
        ("[" * 5000, "nested deeper"),
    ],
)
def test_a_record_that_is_none_spoils_its_bundle(
    data: dict[str, Any], tmp_path: Path, text: str, why: str
) -> None:
    """Each record is read by its own type, with the same care as the bundle."""
    data["files"][RECORD] = text

    told = refused(data, tmp_path / "b.json")

    assert RECORD in told
    assert why in told


def test_a_record_of_another_model_or_quant_is_refused(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """A record speaks of what its path says."""
    other = dict(data["files"])
    other[RECORD] = other[RECORD].replace(f'"{MODEL}"', f'"{TWIN}"')
    mixed = dict(data["files"])
    mixed[f"results/{MODEL}/benchmark/Q8_0.json"] = mixed[f"results/{MODEL}/benchmark/Q2_K.json"]

    assert "speaks of another model" in refused({**data, "files": other}, tmp_path / "b.json")
    assert "speaks of another quant" in refused({**data, "files": mixed}, tmp_path / "b.json")


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("publish@tiny-llama", {}, "is no stage that measures"),
        ("fetch@twin", {}, "is no stage that measures"),
        ("report", {}, "is no stage that measures"),
        (f"quantize@{MODEL}-Q9_Z", {}, "is no stage that measures"),
        (ENTRY, {"cmd": "python -m pipelines choose tiny-llama; id"}, "runs "),
        (ENTRY, {"cmd": ["sh", "-c", "id"]}, "is not what DVC writes"),
        (ENTRY, {"wdir": "/"}, "is not what DVC writes"),
        (ENTRY, {"params": {"params.yaml": {}}}, "reads other parameters"),
        (ENTRY, {"params": "x"}, "is not what DVC writes"),
        (ENTRY, {"outs": [{"path": "/etc/passwd"}]}, "not of tiny-llama"),
        (ENTRY, {"outs": [{"path": "results/twin/choice.json"}]}, "not of tiny-llama"),
        (ENTRY, {"outs": [{"path": "results/tiny-llama/../x"}]}, "not of tiny-llama"),
        (ENTRY, {"outs": [{"path": "corpora/prompts.yaml"}]}, "not of tiny-llama"),
        (ENTRY, {"deps": [{"path": "work/twin/f16.gguf"}]}, "not of tiny-llama"),
        (ENTRY, {"outs": [{"path": RECORD, "md5": "x"}]}, "is not what DVC writes"),
        (ENTRY, {"outs": [{"path": RECORD, "size": -1}]}, "is not what DVC writes"),
        (ENTRY, {"outs": [{"path": RECORD, "hash": "sha1"}]}, "is not what DVC writes"),
    ],
)
def test_an_entry_of_the_lock_is_one_that_dvc_writes_for_this_model(
    data: dict[str, Any], tmp_path: Path, name: str, change: dict[str, Any], why: str
) -> None:
    """A lock decides what DVC believes to be done: nothing else comes in by a bundle."""
    whole = {"path": RECORD, "hash": "md5", "md5": "0" * 32, "size": 1}
    change = {
        key: [{**whole, **each} for each in value] if key in {"outs", "deps"} else value
        for key, value in change.items()
    }
    data["lock"][name] = data["lock"][ENTRY] | change

    assert why in refused(data, tmp_path / "b.json")


def test_a_link_and_a_folder_are_no_bundles(tmp_path: Path, data: dict[str, Any]) -> None:
    """Nothing is read through a link that an archive left behind."""
    (tmp_path / "real.json").write_text(json.dumps(data))
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")

    for path, why in (("link.json", "is no file"), (".", "is no file"), ("no", "is not there")):
        with pytest.raises(BundleError, match=why):
            bundle.read(tmp_path / path)


# --- agreement --------------------------------------------------------------------------------


def _told(at: Layout, record: Any) -> list[str]:
    return list(bundle_checks.agreement(record, declaration.load(at.params), measured=True))


def test_a_good_bundle_of_another_machine_agrees(at: Layout) -> None:
    """What the tests below spoil is right to begin with."""
    assert _told(at, bundle_of(at)) == []


def test_a_number_that_was_made_better_is_not_that_of_the_lock(at: Layout) -> None:
    """A record that was edited after its stage is not what the stage wrote."""
    good = bundle_of(at)
    files = good.files | {RECORD: good.files[RECORD].replace("0.00", "0.01", 1)}

    told = _told(at, good.model_copy(update={"files": files}))

    assert any(f"{RECORD} is not what {ENTRY} wrote" in text for text in told)


def test_a_stage_that_read_another_file_than_there_is_now_is_said(at: Layout) -> None:
    """Two runs put together are no run."""
    good = bundle_of(at)
    lock = json.loads(json.dumps(good.lock))
    dep = next(d for d in lock[ENTRY]["deps"] if d["path"].endswith("/benchmark"))
    dep["md5"] = "0" * 32 + ".dir"

    told = _told(at, good.model_copy(update={"lock": lock}))

    assert told == [f"{MODEL} on {HOST}: {ENTRY} read another {dep['path']} than there is now."]


def test_other_parameters_than_the_declared_ones_are_said(at: Layout) -> None:
    """A gate that was looser while it was measured is not the declared one."""
    good = bundle_of(at)
    lock = json.loads(json.dumps(good.lock))
    slice_ = lock[ENTRY]["params"][f"work/params/choose/{MODEL}.json"]
    slice_["gates"]["max_kld_mean_nats"] = 9.0
    lock[f"fetch@{MODEL}"]["params"][f"work/params/fetch/{MODEL}.json"]["spare"] = 1
    lock[f"convert@{MODEL}"]["params"][f"work/params/convert/{MODEL}.json"]["recipe"] = True

    told = _told(at, good.model_copy(update={"lock": lock}))

    for name, which in (("choose", "gates"), ("fetch", "spare"), ("convert", "true for 1")):
        assert any(f"{name}@{MODEL} was run with other parameters than params.yaml declares "
                   f"({which})" in text for text in told)  # fmt: skip


def test_numbers_of_two_machines_are_no_measurement(at: Layout) -> None:
    """One benchmark from elsewhere is named; so is a machine whose facts are not its own."""
    good = bundle_of(at)
    told = json.loads(good.files[f"results/{MODEL}/benchmark/Q2_K.json"])
    mixed = edited(good, at, "benchmark/Q2_K.json", machine={**told["machine"], "hw_id": "0" * 64})
    facts = {"schema_version": 1, "hw_id": good.machine_id, **FACTS, "memory_gib": 1}
    other = good.model_copy(update={"machine": json.dumps(facts)})

    assert any("Q2_K.json was measured on another machine" in text for text in _told(at, mixed))
    assert any("is not of the machine that the bundle names" in text for text in _told(at, other))
    assert machine.facts_id(FACTS) == good.machine_id


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"toolchain": "{}"}, "work/toolchain.json is not the one of dvc.lock"),
        ({"toolchain": "["}, "is not JSON"),
        ({"toolchain_id": "0" * 32}, "ran with another toolchain than the bundle names"),
        ({"machine": ""}, "work/machine.json"),
        ({"ggufs": ()}, "is not named with the digest of quantize"),
        ({"failures": ("the disk was full",)}, "the disk was full."),
        ({"lock": {}}, "dvc.lock has no entry of"),
        ({"files": {}}, "is missing"),
    ],
)
def test_what_does_not_fit_together_is_said(at: Layout, changes: dict[str, Any], why: str) -> None:
    """Tools, machine, digests, and what a bundle says of itself."""
    told = _told(at, bundle_of(at).model_copy(update=changes))

    assert any(why in text for text in told), told


def test_another_toolchain_than_the_declared_one_is_said(at: Layout) -> None:
    """The declaration was raised after the measurement, or the machine has an older one."""
    good = bundle_of(at)
    text = at.params.read_text()
    assert "llama_cpp_python: 0.3.36" in text
    at.params.write_text(text.replace("llama_cpp_python: 0.3.36", "llama_cpp_python: 0.3.37"))

    assert any('was llama-cpp-python "0.3.36", not 0.3.37' in text for text in _told(at, good))


@pytest.mark.parametrize(
    ("stage", "kind", "name"),
    [
        (f"load-test@{MODEL}", "deps", "modelfiles"),
        (f"benchmark@{MODEL}-Q8_0", "deps", "work/machine.json"),
        (f"choose@{MODEL}", "deps", f"results/{MODEL}/evaluate.json"),
        (f"choose@{MODEL}", "outs", f"results/{MODEL}/frontier.json"),
    ],
)
def test_an_entry_of_the_lock_names_all_that_its_stage_reads_and_writes(
    at: Layout, stage: str, kind: str, name: str
) -> None:
    """What an entry leaves out, nobody could hold against what there is."""
    good = bundle_of(at)
    lock = copy.deepcopy(good.lock)
    lock[stage][kind] = [each for each in lock[stage][kind] if each["path"] != name]
    assert lock != good.lock
    files = {path: text for path, text in good.files.items() if kind == "deps" or path != name}

    told = _told(at, good.model_copy(update={"lock": lock, "files": files}))

    what = "reads" if kind == "deps" else "writes"
    assert any(f"{stage} {what} other files" in text and name in text for text in told)


def test_what_a_graph_before_this_one_named_as_well_is_passed_over(at: Layout) -> None:
    """DVC runs nothing again for it, and leaves it in the lock as it once was."""
    good = bundle_of(at)
    lock = copy.deepcopy(good.lock)
    earlier = {"hash": "md5", "md5": "0" * 32, "size": 1}
    entry = lock[f"quantize@{MODEL}-Q8_0"]
    entry["deps"].append({"path": f"results/{MODEL}/convert.json"} | earlier)
    entry["outs"].append({"path": f"results/{MODEL}/more.json"} | earlier)

    assert _told(at, good.model_copy(update={"lock": lock})) == []


def test_a_quant_that_is_not_declared_is_said(at: Layout) -> None:
    """A bundle of before the declaration changed holds what nobody wants."""
    good = bundle_of(at)
    lines = at.params.read_text().splitlines(keepends=True)
    at.params.write_text("".join(line for line in lines if f"{MODEL}-Q2_K:" not in line))

    assert any(f"quantize@{MODEL}-Q2_K" in text and "not declared" in text
               for text in _told(at, good))  # fmt: skip
