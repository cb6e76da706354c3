"""`fleet compare`: the real thing on the embedded model, and every way in which it says no."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import encoder_factory
import psutil
import pytest
import record_factory
import release_factory
import sample

from pipelines import (
    benchmark,
    compare,
    compare_quality,
    compare_run,
    compare_sides,
    compare_words,
    declaration,
    llamacpp,
    params,
    publishing,
    records,
    release_records,
)
from pipelines.compare_records import CompareRecord
from pipelines.compare_run import Journal, Pair, ProcessRun, Session
from pipelines.errors import FleetError, MachineError, ParamsError
from pipelines.layout import Layout
from pipelines.stores import open_store

if TYPE_CHECKING:
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
QUICK = {
    "prompt_tokens": "16", "generate_tokens": "4", "depths": "[0]", "repetitions": "4",
    "dropped_repetitions": "1", "chunks": "16",
}  # fmt: skip
COMPARE = "compare: {pairs: 4, control_pairs: 3, repetitions: 3, dropped_repetitions: 1}\n\n"
AUTHOR = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")


# --- the real thing ---------------------------------------------------------------------------


def run(
    root: Path, *argv: str, code: int | None = 0, module: str = "pipelines"
) -> subprocess.CompletedProcess[str]:
    """Run a program of our environment in a checkout, as a user whose venv is active does."""
    done = subprocess.run(
        [sys.executable, "-m", module, *argv],
        cwd=root,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert code is None or done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def environment() -> dict[str, str]:
    """Our environment with our programs first."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}


def git(root: Path, *argv: str) -> str:
    """Run git, and return what it prints."""
    done = subprocess.run(
        ["git", *AUTHOR, *argv], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def edit(path: Path, pattern: str, by: str) -> None:
    """Replace what has to be there."""
    text, count = re.subn(pattern, by, path.read_text(), flags=re.MULTILINE)
    assert count, pattern
    path.write_text(text)


def template(root: Path) -> None:
    """Lay out a fork with short measurements of one thread, and two quants."""
    sample.take(root, *sample.CHECKOUT)
    declared = root / "params.yaml"
    for key, value in QUICK.items():
        edit(declared, rf"^( +){key}: .*$", rf"\g<1>{key}: {value}")
    edit(declared, r"^benchmark:\n", f"{COMPARE}benchmark:\n  threads: 1\n")
    # No importance matrix: neither of the two needs one.
    edit(declared, r"^    calibration: calibration\n", "")
    edit(declared, r"^  .*imatrix: true.*\n", "")


@pytest.fixture(scope="session", name="history")
def _history(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Path:
    """A fork of two commits: a quant as it was, and with another type of its output tensor."""
    assert tools.tool("llama-quantize").exists()
    root = tmp_path_factory.mktemp("compare") / "fork"
    template(root)
    git(root.parent, "init", "-q", str(root))
    stage = f"quantize@{MODEL}-Q4_K_M"
    run(root, "repro", stage, module="dvc")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "before")
    edit(root / "params.yaml", r"type: Q4_K_M\}", "type: Q4_K_M, output_tensor_type: q8_0}")
    run(root, "repro", stage, module="dvc")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "bump")
    return root


@pytest.fixture(scope="session", name="compared")
def _compared(
    history: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A fresh clone in which the bump was compared with what was before, and what was printed."""
    root = tmp_path_factory.mktemp("compare") / "clone"
    git(history, "clone", "-q", str(history), str(root))
    return root, run(root, "compare", MODEL, "--base", "HEAD~1", "--quant", "Q4_K_M")


def record_of(root: Path) -> CompareRecord:
    """Read what the last comparison left."""
    return records.read(root / "results" / MODEL / "compare.json", CompareRecord)


def quantized(root: Path, rev: str) -> dict[str, Any]:
    """Return the record of the quant in a commit."""
    found: dict[str, Any] = json.loads(
        git(root, "show", f"{rev}:results/{MODEL}/quantize/Q4_K_M.json")
    )
    return found


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(900)
def test_a_bump_is_compared_from_a_fresh_clone(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Both files are made again from their commits, byte for byte, and measured in turns."""
    root, done = compared
    record = record_of(root)

    assert record.champion.gguf_sha256 == quantized(root, "HEAD~1")["gguf"]["sha256"]
    assert record.challenger.gguf_sha256 == quantized(root, "HEAD")["gguf"]["sha256"]
    assert record.champion.gguf_sha256 != record.challenger.gguf_sha256
    assert "HEAD~1" in record.champion.source
    assert git(root, "worktree", "list").count("\n") == 0
    if record.validity.verdict == "VALID":  # a busy machine may say that it cannot tell
        assert all(len(one.pairs) in {4, 8} for one in record.speed)
    for line in compare_words.table(record):
        assert line in done.stdout
    assert record.sentence in done.stdout


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(900)
def test_divergence_is_compared_block_by_block_from_the_same_f16(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """An output tensor of 8 bits instead of 6 is closer to f16, and the interval is of pairs."""
    quality = record_of(compared[0]).quality

    assert quality is not None
    assert quality.same_f16
    assert quality.challenger_kld_mean_nats < quality.champion_kld_mean_nats
    assert quality.log_ratio_low <= quality.log_ratio <= quality.log_ratio_high
    assert quality.outcome in {"equal", "better"}


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(900)
def test_an_f16_from_elsewhere_gets_logits_of_its_own(
    compared: tuple[Path, subprocess.CompletedProcess[str]], tools: Toolchain
) -> None:
    """A champion of another f16 is read against that one; the same bytes give the same numbers."""
    at = Layout(compared[0])
    declared = declaration.load(at.params)
    wanted = params.benchmark_slice(declared, f"{MODEL}-Q4_K_M")
    f16 = records.read(at.model_record("convert", MODEL), records.ConvertRecord).gguf
    elsewhere = at.scratch(MODEL) / "other-f16.gguf"
    shutil.copyfile(at.f16(MODEL), elsewhere)
    gguf = at.gguf(MODEL, f"{MODEL}-Q4_K_M")
    run_as = benchmark.execution(declared.benchmark, tools.backend, cores=1)

    found = [
        compare_quality.measure(
            at, wanted, run_as,
            compare_quality.Subject(
                gguf=gguf, model_size_bytes=compare.tensor_bytes(gguf), tools=tools, f16=path,
                f16_digest=f16,
            ),
        )
        for path in (at.f16(MODEL), elsewhere)
    ]  # fmt: skip

    assert found[0] == found[1]
    assert len(found[0].blocks_nats) == 16
    assert sum(found[0].blocks_nats) / 16 == pytest.approx(found[0].mean_nats, abs=1e-5)


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(900)
def test_a_kill_loses_one_process_and_the_rest_goes_on(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """After `kill -9` and a torn line nothing runs on, and the next run takes what was measured."""
    root = compared[0]
    argv = [
        *(sys.executable, "-m", "pipelines", "compare", MODEL),
        *("--base", "HEAD~1", "--quant", "Q4_K_M"),
    ]
    child = subprocess.Popen(argv, cwd=root, env=environment(), stderr=subprocess.DEVNULL)
    scratch = root / "work/scratch" / MODEL
    try:
        journal = wait_for_lines(scratch, 4)
        below = psutil.Process(child.pid).children(recursive=True)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True)
              if line.endswith(b"\n")][1:]  # fmt: skip
    with journal.open("ab") as file:
        file.write(b'{"phase": "pairs", "index": 0, "att')
    psutil.wait_procs(below, timeout=5)

    assert not [one for one in below if one.is_running() and one.status() != "zombie"]
    done = run(root, *argv[3:])
    record = record_of(root)
    pairs = [pair for one in record.speed for pair in (*one.control_pairs, *one.pairs)]
    kept = {sample for pair in pairs for sample in pair.champion_samples_tok_s}
    kept |= {sample for pair in pairs for sample in pair.challenger_samples_tok_s}
    first = [one for one in before if one["phase"] == "control" and one["attempt"] == 0]
    assert f"going on after {len(before)} measured runs" in done.stderr
    void = {(one.phase, one.index) for one in record.void_pairs}
    if record.speed and ("control", 0) not in void and len(first) > 1:
        assert set(first[0]["samples_tok_s"][0][1:]) <= kept
    assert not list(scratch.glob("*.jsonl"))


def wait_for_lines(scratch: Path, count: int) -> Path:
    """Wait until a journal has so many lines."""
    ends_at = time.monotonic() + 240
    while time.monotonic() < ends_at:
        for path in scratch.glob("compare-*.jsonl"):
            with contextlib.suppress(OSError):
                if path.read_bytes().count(b"\n") >= count:
                    return path
        time.sleep(0.01)
    raise AssertionError("nothing was measured")


@pytest.mark.alone
@pytest.mark.toolchain
def test_the_same_bytes_are_not_measured(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """Against itself there is nothing to compare: said at once, exit 0, an old record stays."""
    root = compared[0]
    before = (root / "results" / MODEL / "compare.json").read_bytes()

    done = run(root, "compare", MODEL, "--base", "HEAD", "--quant", "Q4_K_M")

    assert "Nothing to compare" in done.stdout
    log = root / f"work/logs/compare-{MODEL}.log"
    assert not log.exists() or "llama-bench" not in log.read_text()
    assert (root / "results" / MODEL / "compare.json").read_bytes() == before


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(900)
def test_the_plan_is_told_and_a_small_budget_is_refused_with_what_would_fit(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """`--plan` measures one process of each side and stops; too short a budget measures nothing."""
    root = compared[0]
    before = (root / "results" / MODEL / "compare.json").read_bytes()
    common = ("compare", MODEL, "--base", "HEAD~1", "--quant", "Q4_K_M")

    planned = run(root, *common, "--plan")
    refused = run(root, *common, "--budget", "0.001", code=2)

    assert re.search(r"4 pairs and 3 of control x 2 tests, about \d+ (s|min)", planned.stderr)
    assert "budget is 0 s: nothing was measured" in refused.stderr
    assert "--budget" in refused.stderr.split("next:")[1]
    assert (root / "results" / MODEL / "compare.json").read_bytes() == before


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--base", "no-such-branch"), "git knows no commit"),
        (("--base=--output=/tmp/x",), "git knows no commit"),
        (("--quant", "Q4_KM"), 'did you mean "Q4_K_M"?'),
        ((), "choice.json does not exist"),
    ],
)
def test_a_side_that_is_not_there_is_named(
    compared: tuple[Path, subprocess.CompletedProcess[str]], argv: tuple[str, ...], said: str
) -> None:
    """A commit, a quant, a choice that do not exist: an error with the next step, no traceback."""
    quant = () if not argv or "--quant" in argv else ("--quant", "Q4_K_M")
    done = run(compared[0], "compare", MODEL, *argv, *quant, code=None)

    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert "next:" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.alone
@pytest.mark.toolchain
def test_nothing_to_compare_with_is_a_notice_where_the_caller_expects_that(
    compared: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """A job compares whatever can be compared: a new model is no failure; a wrong name still is."""
    root = compared[0]
    tree = git(root, "hash-object", "-t", "tree", "-w", "/dev/null")
    empty = git(root, "commit-tree", "-m", "no records", tree)
    common = ("compare", MODEL, "--quant", "Q4_K_M", "--base")

    done = run(root, *common, empty, "--if-comparable")
    refused = run(root, *common, empty, code=2)
    wrong = run(root, *common, "nowhere", "--if-comparable", code=None)

    assert f"{MODEL} is not compared: {empty[:12]}" in done.stderr
    assert "there is nothing to compare with" in refused.stderr
    assert wrong.returncode in {1, 2}


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        (r'"f16_sha256": "[0-9a-f]{64}"', f'"f16_sha256": "{"0" * 64}"'),
        (r'"key": "[^"]*"', '"key": "../../../etc/passwd"'),
        (r'"model": "[^"]*"', '"model": "another"'),
        (r'"type": "Q4_K_M"', '"type": "--output=x"'),
    ],
)
def test_records_that_do_not_belong_together_are_not_compared(
    compared: tuple[Path, subprocess.CompletedProcess[str]], pattern: str, by: str
) -> None:
    """A record that was edited, or is of another run, stops the comparison before it begins."""
    path = compared[0] / "results" / MODEL / "quantize/Q4_K_M.json"
    before = path.read_text()
    edit(path, pattern, by)
    try:
        done = run(compared[0], "compare", MODEL, "--base", "HEAD~1", "--quant", "Q4_K_M", code=2)
    finally:
        path.write_text(before)

    assert "do not speak of one quant of one f16" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.toolchain
@pytest.mark.parametrize("llama_cpp", ["installed", "other"])
def test_the_champion_of_a_release_comes_from_the_registry_by_its_digest(
    tmp_path: Path, tools: Toolchain, llama_cpp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stable quant, byte for byte; and only with the llama.cpp that it was made with."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    sample.take(tmp_path, "params.yaml")
    at = Layout(tmp_path)
    declared = declaration.load(at.params)
    made = release_factory.composed(tmp_path / "elsewhere")
    if llama_cpp == "installed":
        of_tools = made.release.tools.model_copy(update={"llama_cpp_commit": tools.commit})
        release = made.release.model_copy(update={"tools": of_tools})
        data = release_records.release_bytes(release)
        made = replace(made, release=release, data=data, id=release_records.release_id(data))
    store = open_store("local", declared, tmp_path)
    publishing.publish(
        made, store, release_factory.ledger(tmp_path), stable="latest", by=release_factory.by()
    )
    if llama_cpp == "other":
        with pytest.raises(MachineError, match="which is not installed here"):
            compare_sides.of_release(declared, at, MODEL, "stable")
        return

    champion = compare_sides.of_release(declared, at, MODEL, "stable")
    path = compare_sides.bring(declared, at, MODEL, champion, champion.gguf)

    assert champion.side.type == made.release.stable_quant
    assert made.id[:12] in champion.side.source
    assert hashlib.sha256(path.read_bytes()).hexdigest() == champion.side.gguf_sha256
    (blob,) = (tmp_path / "registry").rglob(champion.side.gguf_sha256)
    path.unlink()
    blob.chmod(0o600)
    blob.write_bytes(b"x" * blob.stat().st_size)
    with pytest.raises(FleetError):
        compare_sides.bring(declared, at, MODEL, champion, champion.gguf)
    assert not path.exists()


# --- journals ---------------------------------------------------------------------------------


def process(  # noqa: PLR0913 - each is one fact about a process
    *,
    phase: str = "pairs",
    index: int = 0,
    attempt: int = 0,
    letter: str = "A",
    speed: float = 100.0,
    waiting: float = 0.0,
    steal: float = 0.0,
    clock: float | None = None,
    reasons: tuple[str, ...] = (),
) -> ProcessRun:
    """A process of llama-bench that measured prefill and decode at about one speed."""
    conditions: list[dict[str, Any]] = [
        {"rule": "waiting_share", "outcome": "ok", "value": waiting, "limit": 0.5},
        {"rule": "steal_share", "outcome": "ok", "value": steal, "limit": 0.1},
    ]
    if clock is not None:
        conditions.append({"rule": "clock_mhz", "outcome": "ok", "value": clock, "limit": None})
    return ProcessRun.model_validate(
        {
            "phase": phase,
            "index": index,
            "attempt": attempt,
            "letter": letter,
            "ended_at": time.time(),
            "wall_s": 1.0,
            "samples_tok_s": [[9.0, speed, speed, speed], [9.0, speed, speed, speed]],
            "gpu_info": "",
            "validity": {
                "verdict": "INVALID" if reasons else "VALID",
                "reasons": reasons,
                "notes": [],
                "load_before": 0.1,
                "load_after": 0.1,
                "steal_share": steal,
                "gpu_info": "",
                "conditions": conditions,
            },
        }
    )


def test_a_journal_of_another_comparison_boot_or_day_is_not_gone_on_with(tmp_path: Path) -> None:
    """Samples are only put together if they are of one machine, one boot, one morning."""
    path = tmp_path / "compare-1.jsonl"
    journal = Journal(path, "key")
    journal.append(process())
    assert Journal(path, "key").runs == journal.runs
    good = path.read_text()

    for wrong in (
        good.replace('"key":"key"', '"key":"other"'),
        re.sub(r'"boot_id":"[^"]*"', '"boot_id":"another"', good),
        re.sub(r'"begun_at":[0-9.]+', f'"begun_at":{time.time() - 7 * 3600}', good),
        re.sub(r'"begun_at":[0-9.]+', f'"begun_at":{time.time() + 3600}', good),
        good.replace('"wall_s":1.0', '"wall_s":NaN'),
        good.replace('"phase":"pairs"', '"phase":"\u202eevil"'),
        "",
        "[]\n",
    ):
        path.write_text(wrong)
        assert Journal(path, "key").runs == []


def test_a_torn_line_is_dropped_and_the_rest_is_kept(tmp_path: Path) -> None:
    """A kill in the middle of a write costs that process alone, at whatever byte it came."""
    path = tmp_path / "compare-1.jsonl"
    journal = Journal(path, "key")
    for index in range(3):
        journal.append(process(index=index))
    whole = path.read_bytes()
    ends = [found.end() for found in re.finditer(rb"\n", whole)]

    for cut in range(ends[0], len(whole) + 1, 97):
        path.write_bytes(whole[:cut])
        again = Journal(path, "key")
        assert len(again.runs) == sum(end <= cut for end in ends[1:])
        again.append(process(index=9))
        assert Journal(path, "key").runs[-1].index == 9


# --- what voids a pair ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"speed": 1.0}, ""),
        ({"waiting": 0.3}, {"waiting": 0.31, "speed": 50.0}, ""),
        ({"waiting": 0.0}, {"waiting": 0.08}, "waited for a core in 8 % more"),
        ({"steal": 0.06}, {}, "lost to the host in 6 % more"),
        ({"clock": 1900.0}, {"clock": 1700.0}, "1,700 and 1,900 MHz, differ by 10.5 %"),
        ({}, {"reasons": ("Other programs computed on the card: x.",)}, "Other programs"),
    ],
)
def test_a_pair_is_void_for_what_others_did_and_never_for_its_speed(
    first: dict[str, Any], second: dict[str, Any], reason: str
) -> None:
    """A hundredfold difference stands; 8 % more waiting does not."""
    found = compare_run.disturbance(process(**first), process(letter="B", **second), 0.03)

    assert bool(found) == bool(reason)
    assert reason in re.sub(r"(\d)\.00", r"\1", found)


def plan(pairs: int = 8, control_pairs: int = 4) -> compare_run.Plan:
    """A plan of two tests."""
    return compare_run.Plan(
        pairs=pairs,
        control_pairs=control_pairs,
        repetitions=4,
        dropped_repetitions=1,
        prompt_tokens=16,
        generate_tokens=4,
        depths=(0,),
        execution=llamacpp.Execution(
            threads=1, gpu_layers=0, flash_attention=True, kv_type="f16", batch_tokens=64,
            ubatch_tokens=64,
        ),
        effects={"decode": 0.03, "prefill": 0.05},
    )  # fmt: skip


def recorded(journal: Journal, *, loss: float = 0.0, noise: float = 0.0, pairs: int = 8) -> None:
    """Write down a whole run in which the challenger loses a share, and the control is noisy."""
    journal.append(process(phase="warm-up"))
    journal.append(process(phase="warm-up", letter="B"))
    for phase, count, lost in (("control", 4, 0.0), ("pairs", pairs, loss)):
        for index in range(count):
            factor = math.exp(noise * (-1) ** index * (1 + index)) if phase == "control" else 1.0
            order = ("A", "B") if index % 2 == 0 else ("B", "A")
            for letter in order:
                speed = 100.0 * (factor * (1 - lost) if letter == "B" else 1.0)
                journal.append(process(phase=phase, index=index, letter=letter, speed=speed))


def session(tmp_path: Path, *, budget_s: float = 1e6, **run: float) -> Session:
    """A session of which all was measured before: it replays its journal, and starts nothing."""
    journal = Journal(tmp_path / "journal.jsonl", "key")
    recorded(journal, **run)  # type: ignore[arg-type]
    return Session(
        plan=plan(), sides={}, root=tmp_path, log=tmp_path / "log", journal=journal,
        budget_s=budget_s,
    )  # fmt: skip


def test_a_loss_is_worse_and_none_is_equal(tmp_path: Path) -> None:
    """Ten percent less in every pair is worse; the same in every pair is as good."""
    (tmp_path / "b").mkdir()
    worse = compare.measure(session(tmp_path, loss=0.10))
    equal = compare.measure(session(tmp_path / "b"))

    assert [one.outcome for one in worse.speed] == ["worse", "worse"]
    assert worse.speed[0].sentence.startswith("Prefill is slower: -10.0 % [-10.0, -10.0]")
    assert [one.outcome for one in equal.speed] == ["equal", "equal"]
    assert worse.validity.verdict == equal.validity.verdict == "VALID"
    assert not worse.doubled


def test_a_machine_that_differs_from_itself_gets_no_verdict(tmp_path: Path) -> None:
    """A control that scatters by half says INVALID, why, and what to do; no pair is measured."""
    found = compare.measure(session(tmp_path, noise=0.3))

    assert found.validity.verdict == "INVALID"
    assert found.validity.reasons[0].startswith("The machine is too noisy")
    assert "stop what else runs here" in found.validity.reasons[0]
    assert all(one.outcome == "undecided" and not one.pairs for one in found.speed)
    assert all(len(one.control_pairs) == 4 for one in found.speed)


def test_a_spent_budget_ends_the_run_and_says_so(tmp_path: Path) -> None:
    """What is missing when the time is over is not measured: INVALID, with the way out."""
    found = compare.measure(session(tmp_path, budget_s=1.0, pairs=5))

    assert found.validity.verdict == "INVALID"
    assert "was spent before pairs 6" in found.validity.reasons[0]
    assert len(found.speed[0].pairs) == 5


def test_a_declaration_that_leaves_no_repetition_is_refused() -> None:
    """Dropping all of them is a slip in params.yaml."""
    with pytest.raises(ParamsError, match="leaves none of 4"):
        compare_run.refuse_wrong_plan(replace(plan(), dropped_repetitions=4))


def test_the_tests_that_decide_are_the_first_prefill_and_the_deepest_decode() -> None:
    """What users feel decides; the rest is reported."""
    deep = replace(plan(), depths=(0, 256, 4096))
    gated = [(deep.tests[n].test, deep.tests[n].depth_tokens) for n in deep.gated]
    encoder = replace(plan(), generate_tokens=0)

    assert gated == [("prefill", 0), ("decode", 4096)]
    assert [encoder.tests[n].test for n in encoder.gated] == ["prefill"]


# --- divergence and items ---------------------------------------------------------------------


def divergences(*blocks: float) -> compare_quality.Divergences:
    """Blocks of divergence."""
    return compare_quality.Divergences(
        mean_nats=sum(blocks) / len(blocks), blocks_nats=blocks, chunks=len(blocks)
    )


def test_running_means_give_back_their_blocks() -> None:
    """Blocks of windows are exact where single windows would be all rounding."""
    windows = [0.01 + 0.002 * (number % 7) for number in range(100)]
    running = tuple(round(sum(windows[: n + 1]) / (n + 1), 5) for n in range(100))
    found = compare_quality.block_means(running)

    assert len(found) == 20
    for number, mean in enumerate(found):
        assert mean == pytest.approx(sum(windows[5 * number : 5 * number + 5]) / 5, abs=2.5e-4)
    assert len(compare_quality.block_means((0.1, 0.2, 0.3))) == 3


@pytest.mark.parametrize(
    ("factor", "outcome"), [(1.5, "worse"), (1.0, "equal"), (0.5, "better"), (1.1, "undecided")]
)
def test_more_divergence_is_worse(factor: float, outcome: str) -> None:
    """Fifty percent more divergence is worse, half of it better, on the same windows."""
    old = [0.02 + 0.003 * (n % 5) for n in range(20)]
    new = [each * factor * (1 + 0.02 * (-1) ** n) for n, each in enumerate(old)]
    found = compare_quality.compare(
        divergences(*old), divergences(*new), corpus_sha256="0" * 64, effect=0.1, same_f16=True
    )

    assert found.outcome == outcome


def test_two_that_are_as_good_as_f16_are_equal() -> None:
    """Tenfold of nearly nothing is nearly nothing."""
    found = compare_quality.compare(
        divergences(*[2e-5] * 20), divergences(*[3e-4] * 20),
        corpus_sha256="0" * 64, effect=0.1, same_f16=True,
    )  # fmt: skip

    assert found.outcome == "equal"
    assert "below 0.001 nats for both" in found.sentence


def test_items_are_compared_one_by_one() -> None:
    """Ten items lost and none won are harm; as many won as lost are chance."""
    lost = compare.flips("set", "1" * 20, "0" * 10 + "1" * 10, 0.05)
    even = compare.flips("set", "1100" * 5, "0110" * 5, 0.05)

    assert (lost.outcome, lost.lost_count, lost.won_count) == ("worse", 10, 0)
    assert (even.outcome, even.lost_count, even.won_count) == ("equal", 5, 5)


def test_a_worktree_that_a_kill_left_is_swept(tmp_path: Path) -> None:
    """Neither its files nor git's note of it stay, and no other worktree is touched."""
    root, scratch = tmp_path / "fork", tmp_path / "fork/work/scratch"
    scratch.mkdir(parents=True)
    git(tmp_path, "init", "-q", str(root))
    git(root, "commit", "-q", "--allow-empty", "-m", "one")
    for path in (scratch / "fleet-compare-x/tree", tmp_path / "mine"):
        git(root, "worktree", "add", "-q", "--detach", str(path))
    (scratch / "fleet-compare-y").mkdir()
    at = Layout(root)
    compare_sides._sweep(compare_sides._Git(at, MODEL), scratch)

    assert list(scratch.iterdir()) == []
    listed = git(root, "worktree", "list")
    assert "fleet-compare" not in listed
    assert str(tmp_path / "mine") in listed


def test_items_without_harm_are_not_called_as_good() -> None:
    """Of a few items no proof of harm is all that can be said."""
    flips = compare.flips("set", "1110", "1101", 0.05)
    record = record_factory.compare_record(flips=(flips,))
    (row,) = [row for row in compare_words.rows(record) if row.what.startswith("set")]

    assert row.outcome == "no proof of harm"


@pytest.mark.parametrize(("outcome", "words"), [("equal", "as fast as"), ("better", "faster than")])
def test_speed_alone_is_never_called_as_good(outcome: str, words: str) -> None:
    """Where nothing else was compared the sentence says so itself, not a note below."""
    record = record_factory.compare_record(outcome)
    said = compare_words.outcome_sentence(record)

    assert words in said
    assert "nothing but speed was compared" in said


@pytest.mark.alone
@pytest.mark.toolchain
def test_an_encoder_is_compared_by_its_prefill(tmp_path: Path, tools: Toolchain) -> None:
    """It decodes nothing and has no divergence: real pairs of prefill decide, and that is told."""
    gguf = encoder_factory.tiny_bert_gguf(tmp_path / "bert.gguf")
    declared = declaration.load(sample.of("params.yaml"))
    whole = compare.plan_of(declared, MODEL, gguf, backend=tools.backend, cores=2)
    short = replace(
        whole, pairs=4, control_pairs=3, repetitions=3, prompt_tokens=16,
        execution=replace(whole.execution, threads=1),
    )  # fmt: skip
    side = compare_run.Runner(
        tools=tools, model=gguf.name, model_size_bytes=compare.tensor_bytes(gguf)
    )
    begun = Session(
        plan=short, sides={"A": side, "B": side}, root=tmp_path, log=tmp_path / "log",
        journal=Journal(tmp_path / "journal.jsonl", "key"), budget_s=120.0, quiet_within_s=0.0,
    )  # fmt: skip
    begun.warm_up()
    measured = compare.measure(begun, doubling_fits=False)

    assert [(test.test, test.depth_tokens) for test in whole.tests] == [("prefill", 0)]
    assert whole.gated == (0,)
    assert [one.test for one in measured.speed] == ["prefill"]
    assert measured.speed[0].control_pairs or measured.validity.reasons
    assert "embeddings" in " ".join((tmp_path / "log").read_text().split())


def test_a_pair_keeps_every_sample() -> None:
    """The record holds what was measured, without the first repetition."""
    pair = Pair(index=1, champion=process(), challenger=process(letter="B", speed=90.0))
    sample = pair.sample(0, 1)

    assert sample.order == "BA"
    assert sample.champion_samples_tok_s == (100.0, 100.0, 100.0)
    assert sample.log_ratio == pytest.approx(math.log(0.9))
