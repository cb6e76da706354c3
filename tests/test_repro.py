"""`fleet repro` on small graphs of shell commands, run by the real DVC."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from record_factory import benchmark_record, validity
from test_runner import read_outputs

from pipelines import live, orphans, params, records, repro
from pipelines.__main__ import STAGES
from pipelines.declaration import load
from pipelines.errors import MachineError, ParamsError
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
GONE_WITHIN_S = 5.0

# What `fleet repro` does once the declaration is read; the stages here are no real ones.
DRIVER = """
import sys
from pathlib import Path
from pipelines import console, repro
from pipelines.errors import FleetError
from pipelines.layout import Layout
names = tuple(sys.argv[2].split())
try:
    plan = repro.Plan(targets=names if "t" in sys.argv[1] else (), stages=names, models=())
    code = repro.run(Layout(), plan, force="f" in sys.argv[1], wait="w" in sys.argv[1])
except FleetError as error:
    console.error(error.message)
    code = error.exit_code
sys.exit(code)
"""


@pytest.fixture
def graph(tmp_path: Path) -> Callable[[dict[str, dict[str, Any]]], Path]:
    """Make a checkout whose dvc.yaml has these stages."""

    def make(stages: dict[str, dict[str, Any]]) -> Path:
        root = tmp_path / "fleet"
        root.mkdir()
        (root / "dvc.yaml").write_text(json.dumps({"stages": stages}))
        (root / ".gitignore").write_text("/work/\n")
        for argv in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
            subprocess.run(argv, cwd=root, check=True, capture_output=True)
        return root

    return make


def start(root: Path, names: str = "", how: str = "-", **env: str) -> subprocess.Popen[str]:
    """Start a run as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, how, names],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(root: Path, names: str = "", how: str = "-", **env: str) -> tuple[int, str]:
    """Run to the end; return the exit code and what stderr said."""
    process = start(root, names, how, **env)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def wait_for(path: Path) -> None:
    """Wait until a stage has written a file."""
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def survivors(pids: list[int]) -> list[int]:
    """Return those of the processes that are still there when the grace period is over."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < deadline and any(lives(pid) for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if lives(pid)]


def lives(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has reaped yet does not."""
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


SLEEPER = {
    # A shell that stays, a child in a group of its own, a grandchild in a session of its own.
    "cmd": "echo $$ > pids; setsid sleep 300 & echo $! >> pids; "
    "(sleep 301; true) & echo $! >> pids; touch ready; echo go > ready; wait; echo x > slow.txt",
    "outs": ["slow.txt"],
}


def below(root: Path) -> list[int]:
    """Return the processes that a sleeping stage wrote down, and DVC itself."""
    wait_for(root / "ready")
    shells = [int(line) for line in (root / "pids").read_text().split()]
    return [*shells, *(process.pid for process in psutil.Process(shells[0]).parents()[:1])]


# --- outcomes ---------------------------------------------------------------------------------


def test_first_run_does_everything_and_second_does_nothing(graph: Callable[..., Path]) -> None:
    """A first run runs every stage; a second says that all are unchanged and runs none."""
    root = graph(
        {
            "a": {"cmd": "echo A > a.txt", "outs": ["a.txt"]},
            "b": {"cmd": "cat a.txt > b.txt", "deps": ["a.txt"], "outs": ["b.txt"]},
        }
    )

    first = run(root, "a b")
    second = run(root, "a b")

    assert first[0] == 0
    assert re.search(r"^2 done in ", first[1], re.MULTILINE)
    assert second[0] == 0
    assert re.search(r"^2 unchanged in ", second[1], re.MULTILINE)


def test_force_runs_unchanged_stages(graph: Callable[..., Path]) -> None:
    """`--force` runs stages whose inputs did not change."""
    root = graph({"a": {"cmd": "echo x >> runs; echo A > a.txt", "outs": ["a.txt"]}})

    run(root, "a")
    code, stderr = run(root, "a", how="f")

    assert code == 0
    assert (root / "runs").read_text() == "x\nx\n"
    assert "1 done in" in stderr


def test_stage_restored_from_the_cache_is_told_apart(graph: Callable[..., Path]) -> None:
    """A stage whose result DVC has in its cache is shown as cached, not as done."""
    stage = {"cmd": "cat i > o", "deps": ["i"], "outs": ["o"]}
    root = graph({"a": stage})
    for content in ("one", "two"):
        (root / "i").write_text(content)
        run(root, "a")
    (root / "i").write_text("one")

    code, stderr = run(root, "a")

    assert code == 0
    assert "a cached in" in stderr
    assert "1 cached in" in stderr
    assert (root / "o").read_text() == "one"


def test_failure_is_shown_with_cause_code_and_log_while_others_go_on(
    graph: Callable[..., Path],
) -> None:
    """A failed stage shows its own words and its log; others run; the exit code is its own."""
    root = graph(
        {
            "quantize": {
                "foreach": {"m-Q4_0": 1, "m-Q8_0": 2},
                "do": {
                    "cmd": "test ${key} != m-Q4_0 || { "
                    "echo 'error: the tool died of SIGSEGV' >&2; "
                    "echo '  next: look at it' >&2; exit 6; }; echo x > ${key}",
                    "outs": ["${key}"],
                },
            },
            "choose": {"cmd": "echo c > c", "deps": ["m-Q4_0"], "outs": ["c"]},
        }
    )
    log = root / "work/logs/quantize-m-Q4_0.log"
    log.parent.mkdir(parents=True)
    log.write_text("raw\n")

    code, stderr = run(root, "quantize@m-Q4_0 quantize@m-Q8_0 choose")

    assert code == 6
    assert "error: quantize@m-Q4_0 failed after" in stderr
    assert "the tool died of SIGSEGV" in stderr
    assert "next: look at it" in stderr
    assert "log:  work/logs/quantize-m-Q4_0.log" in stderr
    assert "choose  " in stderr
    assert "skipped: needs quantize@m-Q4_0" in stderr
    assert (root / "m-Q8_0").exists()
    assert "1 done, 1 failed, 1 skipped in" in stderr


def test_failures_that_only_dvc_sees_are_placed(graph: Callable[..., Path]) -> None:
    """An output that a stage did not write and an input that nobody makes are named as causes."""
    root = graph(
        {
            "a": {"cmd": "echo A > a.txt", "outs": ["a.txt"]},
            "b": {"cmd": "true", "deps": ["a.txt"], "outs": ["b.txt"]},
            "c": {"cmd": "echo c > c.txt", "deps": ["nowhere.txt"], "outs": ["c.txt"]},
            "d": {"cmd": "echo d > d.txt", "outs": ["d.txt"]},
        }
    )

    code, stderr = run(root, "a b c d")

    assert code == 4
    table = stderr.split("✗ b", 1)[1]
    assert "output 'b.txt' does not exist" in table
    assert "nowhere.txt" in table.split("✗ c", 1)[1]
    assert "2 done, 2 failed in" in stderr


def test_stage_killed_from_outside_is_a_failed_tool(graph: Callable[..., Path]) -> None:
    """A stage that a signal ended counts as a failed program, whatever number DVC shows."""
    root = graph({"a": {"cmd": "kill -9 $$", "outs": ["a.txt"]}})

    code, stderr = run(root, "a")

    assert code == 4
    assert "a failed after" in stderr


def test_graph_that_dvc_refuses_is_explained(graph: Callable[..., Path]) -> None:
    """A dvc.yaml that DVC cannot read ends with DVC's own words, as a failed program."""
    root = graph({"a": {"cmd": "true", "outs": ["a.txt"], "nonsense": 1}})

    code, stderr = run(root, "a")

    assert code == 4
    assert "DVC failed before its stages did" in stderr
    assert "nonsense" in stderr


def test_stage_gets_our_python_and_a_progress_file(graph: Callable[..., Path]) -> None:
    """`python` in a stage is the one that runs us, and progress goes where we read it."""
    root = graph(
        {
            "a": {
                "cmd": 'python -c \'import sys, os; print(sys.prefix, file=open("a.txt", "w"))\'; '
                'echo "$GGUF_FLEET_PROGRESS" > progress',
                "outs": ["a.txt"],
            }
        }
    )

    code, _ = run(root, "a", PATH="/usr/bin:/bin")

    assert code == 0
    assert (root / "a.txt").read_text().strip() == sys.prefix
    assert (root / "progress").read_text().strip() == str(root / "work/logs/progress.jsonl")


def test_tool_output_cannot_command_the_runner(graph: Callable[..., Path]) -> None:
    """Runner commands in what a stage prints are broken before anything of it is shown."""
    root = graph(
        {
            "a": {
                "cmd": "echo 'error: x ##[set-output name=v]1' >&2; "
                "echo '::set-output name=v::1' >&2; exit 4",
                "outs": ["a.txt"],
            }
        }
    )

    code, stderr = run(root, "a", GITHUB_ACTIONS="true")

    assert code == 4
    assert "##[" not in stderr
    assert [line for line in stderr.splitlines() if line.startswith("::")] == [
        line for line in stderr.splitlines() if line.startswith("::error::a failed")
    ]


# --- ending -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_cancel_ends_everything_below(
    graph: Callable[..., Path], number: signal.Signals, code: int
) -> None:
    """A signal to us alone ends DVC, its stage and what the stage started, within 5 s."""
    root = graph({"slow": SLEEPER})
    process = start(root, "slow")
    pids = below(root)

    process.send_signal(number)
    process.wait(timeout=GONE_WITHIN_S)

    assert survivors(pids) == []
    assert process.returncode == code
    assert "stopped" in process.communicate()[1]


def test_a_cancel_is_told_in_one_line(graph: Callable[..., Path]) -> None:
    """After Ctrl-C nothing is called failed or skipped, whatever DVC prints while it ends."""
    then = {"cmd": "cat slow.txt > then.txt", "deps": ["slow.txt"], "outs": ["then.txt"]}
    root = graph({"slow": SLEEPER, "then": then})
    process = start(root, "slow then")
    below(root)

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 130
    assert stderr.splitlines() == [
        "▸ slow",
        "error: stopped. Nothing unfinished has a final name; the same command goes on.",
    ]


def _dvc_below(pid: int) -> list[psutil.Process]:
    """List DVC's process; to find a library, Python starts programs as well."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            found += [child] if "dvc" in " ".join(child.cmdline()) else []
    return found


def test_a_cancel_while_dvc_starts_is_told_in_one_line(graph: Callable[..., Path]) -> None:
    """Also before the first stage, where DVC would complain about its own locks."""
    root = graph({"slow": SLEEPER})
    process = start(root, "slow")
    deadline = time.monotonic() + 60
    while not (children := _dvc_below(process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)

    assert survivors([child.pid for child in children]) == []
    assert process.returncode == 130
    assert stderr.splitlines() == [
        "error: stopped. Nothing unfinished has a final name; the same command goes on."
    ]


def test_kill_of_the_run_leaves_no_process(graph: Callable[..., Path]) -> None:
    """After `kill -9` of `fleet repro` nothing that it started is there 5 s later."""
    root = graph({"slow": SLEEPER})
    process = start(root, "slow")
    pids = below(root)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]

    process.kill()
    process.communicate()

    assert survivors([*pids, *children]) == []


def test_run_after_a_cancel_completes(graph: Callable[..., Path]) -> None:
    """What a cancelled run did not finish, the same command finishes."""
    root = graph(
        {
            "a": {"cmd": "echo A > a.txt", "outs": ["a.txt"]},
            "b": {
                "cmd": "test -e again || { echo go > ready; sleep 300; }; cat a.txt > b.txt",
                "deps": ["a.txt"],
                "outs": ["b.txt"],
            },
        }
    )
    process = start(root, "a b")
    wait_for(root / "ready")
    process.send_signal(signal.SIGTERM)
    process.communicate()
    (root / "again").touch()

    code, stderr = run(root, "a b")

    assert code == 0
    assert "1 done, 1 unchanged in" in stderr
    assert (root / "b.txt").read_text() == "A\n"


# --- one at a time ----------------------------------------------------------------------------


def test_second_run_in_a_checkout_says_who_works_there(graph: Callable[..., Path]) -> None:
    """A second run exits 7 and names the process and the time; with `--wait` it comes after."""
    root = graph(
        {"a": {"cmd": "echo go > ready; while test ! -e on; do sleep 0.1; done; echo A > a.txt",
               "outs": ["a.txt"]}}
    )  # fmt: skip
    first = start(root, "a")
    wait_for(root / "ready")

    code, stderr = run(root, "a")
    waiting = start(root, "a", how="w")
    time.sleep(0.5)
    (root / "on").touch()

    assert code == 7
    assert f"process {first.pid}, since 2" in stderr
    assert first.wait(timeout=60) == 0
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert "1 unchanged in" in said
    first.communicate()


def test_lock_of_a_dead_run_holds_nobody(tmp_path: Path) -> None:
    """A lock file that names a dead process does not keep the next run out."""
    lock = tmp_path / ".dvc/tmp/fleet-repro.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"pid": 999_999_999, "since": "long ago"}))

    with repro.alone(Layout(tmp_path), wait=False):
        held = json.loads(lock.read_text())

    assert held["pid"] == os.getpid()


def test_a_dvc_of_somebody_else_is_named(graph: Callable[..., Path]) -> None:
    """If the user's own `dvc` holds the checkout, that is said, as a matter of the machine."""
    root = graph({"a": {"cmd": "echo A > a.txt", "outs": ["a.txt"]}})
    (root / ".dvc/tmp").mkdir(exist_ok=True)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import zc.lockfile, time; l = zc.lockfile.LockFile('.dvc/tmp/lock'); "
                "open('ready', 'w').write('go'); time.sleep(60)"
            ),
        ],
        cwd=root,
    )
    wait_for(root / "ready")

    code, stderr = run(root, "a")
    holder.kill()
    holder.wait()

    assert code == 7
    assert "another DVC works in this checkout" in stderr


# --- targets ----------------------------------------------------------------------------------


def declaration() -> params.Declaration:
    """Two models, one with two quants."""
    digest = "0" * 64
    model = params.Model(source="path:x", revision="0" * 40, context_tokens=512)
    return params.Declaration(
        toolchain=params.Toolchain(llama_cpp_python="0.3.36", sha256=digest),
        corpora={"evaluation": params.Corpus(path="e.txt", sha256=digest)},
        models={"tiny": model, "small": model},
        quants={
            "tiny-Q8_0": params.Quant(model="tiny", type="Q8_0"),
            "tiny-Q4_0": params.Quant(model="tiny", type="Q4_0"),
            "small-Q8_0": params.Quant(model="small", type="Q8_0"),
        },
        hosts={"here": params.DeclaredHost()},
    )


def test_no_target_means_the_whole_graph() -> None:
    """Without a target DVC gets none, and every declared stage is expected."""
    plan = repro.plan_of(declaration(), [])

    assert plan.targets == ()
    assert plan.models == ("tiny", "small")
    assert len(plan.stages) == 2 + 2 * (3 + 4) + 3 * 2 + 1


def test_model_means_its_choice_and_its_runs() -> None:
    """A model stands for everything up to its choice, its load test, release and tracked runs."""
    plan = repro.plan_of(declaration(), ["small"])

    assert plan.targets == ("choose@small", "load-test@small", "publish@small", "track@small")
    assert "benchmark@small-Q8_0" in plan.stages
    assert not any("tiny" in stage for stage in plan.stages)


def test_quant_means_its_benchmark() -> None:
    """A quant stands for everything up to its benchmark; its model covers it if named too."""
    one = repro.plan_of(declaration(), ["tiny-Q4_0"])
    both = repro.plan_of(declaration(), ["tiny-Q4_0", "tiny"])

    assert one.targets == ("benchmark@tiny-Q4_0",)
    assert "quantize@tiny-Q8_0" not in one.stages
    assert both.targets == ("choose@tiny", "load-test@tiny", "publish@tiny", "track@tiny")


def test_unknown_target_is_refused_with_the_nearest_name() -> None:
    """A name that is neither model nor quant is refused before anything runs."""
    with pytest.raises(ParamsError, match=r'"tiny-Q4_1" is neither .* did you mean "tiny-Q4_0"\?'):
        repro.plan_of(declaration(), ["tiny-Q4_1"])


@pytest.mark.parametrize(
    ("until", "targets"),
    [
        ("fetch", ["fetch@tiny"]),
        ("quantize", ["fetch@tiny", "convert@tiny", "verify@tiny", "calibrate@tiny",
                      "quantize@tiny-Q8_0", "quantize@tiny-Q4_0"]),
        ("choose", ["fetch@tiny", "convert@tiny", "verify@tiny", "calibrate@tiny",
                    "quantize@tiny-Q8_0", "quantize@tiny-Q4_0", "benchmark@tiny-Q8_0",
                    "benchmark@tiny-Q4_0", "evaluate@tiny", "choose@tiny"]),
    ],
)  # fmt: skip
def test_until_ends_the_chain_of_the_named_models_there(until: str, targets: list[str]) -> None:
    """Every stage up to it in the order of the graph, also those that lead to no later one."""
    plan = repro.plan_of(declaration(), ["tiny"], until=until)

    assert list(plan.targets) == targets
    assert plan.stages == ("machine", *targets)
    assert plan.models == ("tiny",)


def test_until_without_a_name_is_of_the_whole_fleet_and_of_a_quant_no_verdict() -> None:
    """All models where none is named; a quant alone has no stage of its model after it."""
    fleet = repro.plan_of(declaration(), [], until="load-test")
    quant = repro.plan_of(declaration(), ["tiny-Q4_0"], until="load-test")

    assert {"load-test@tiny", "load-test@small"} <= set(fleet.targets)
    assert not any(stage.startswith(("publish", "track", "report")) for stage in fleet.stages)
    assert list(quant.targets) == [
        "fetch@tiny", "convert@tiny", "calibrate@tiny", "quantize@tiny-Q4_0", "benchmark@tiny-Q4_0",
    ]  # fmt: skip


def test_until_takes_every_stage_of_a_model_and_no_other(
    fleet: Callable[..., subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    """What `--until` allows is what the graph has, in its order; an empty name is no fleet."""
    assert [stage.name for stage in STAGES if stage.keyed_by != "fleet"] == list(repro.UNTIL)

    wrong = fleet("repro", "--until", "quantise", cwd=checkout)
    blank = fleet("repro", "--until", "quantize", " ", cwd=checkout)

    assert wrong.returncode == 2
    assert "invalid choice: 'quantise'" in wrong.stderr
    assert blank.returncode == 2
    assert "no model or quant is named" in blank.stderr


def test_a_step_gets_what_ran_as_outputs_and_the_job_a_table(
    graph: Callable[..., Path], tmp_path: Path
) -> None:
    """GitHub Actions gets the stages that ran and failed; what a tool said is text and no link."""
    root = graph(
        {
            "a": {"cmd": "echo A > a.txt", "outs": ["a.txt"]},
            "b": {"cmd": "echo 'error: @team [x](http://e) | <b>' >&2; exit 4", "outs": ["b.txt"]},
        }
    )
    given = {"GITHUB_OUTPUT": str(tmp_path / "out"), "GITHUB_STEP_SUMMARY": str(tmp_path / "sum")}

    code, _ = run(root, "a b", GITHUB_ACTIONS="true", **given)

    assert code == 4
    outputs = read_outputs((tmp_path / "out").read_text())
    assert outputs == {"ran": "a", "failed": "b"}
    lines = (tmp_path / "sum").read_text().splitlines()
    assert lines[0].startswith("### fleet repro: 1 done, 1 failed in ")
    assert lines[2:4] == ["| stage | outcome |", "|---|---|"]
    assert lines[4].startswith("| a | done in ")
    assert lines[5].startswith("| b | failed after ")
    assert lines[5].count("|") == 3
    assert "<b>" not in lines[5]
    assert "@team" not in lines[5]
    assert "](http" not in lines[5]


# --- in a terminal ----------------------------------------------------------------------------


def test_terminal_shows_each_stage_and_ends_with_the_table(graph: Callable[..., Path]) -> None:
    """A person sees waiting, running with progress, and at the end the table."""
    root = graph(
        {
            "a": {
                "cmd": 'echo \'{"text": "tensor 7 of 9", "pid": 1}\' >> $GGUF_FLEET_PROGRESS; '
                "echo 'warning: mind the gap' >&2; sleep 4; echo A > a.txt",
                "outs": ["a.txt"],
            },
            "b": {"cmd": "cat a.txt > b.txt", "deps": ["a.txt"], "outs": ["b.txt"]},
        }
    )
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "-", "a b"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100",
             "LINES": "30"},
        stdout=subprocess.PIPE,
        stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = read_terminal(leader)
    process.wait()
    process.communicate()

    assert process.returncode == 0
    assert "▸ a" in shown
    assert "tensor 7 of 9" in shown
    assert "· b" in shown
    assert "warning: a: mind the gap" in shown
    assert re.search(r"2 done in", shown)


def read_terminal(leader: int) -> str:
    """Read everything that a terminal got until its last writer closed it."""
    data = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:
            break
        if not chunk:
            break
        data += chunk
    os.close(leader)
    return data.decode(errors="replace")


# --- marks ------------------------------------------------------------------------------------


def test_mark_names_a_living_owner_only_while_it_lives() -> None:
    """A mark of ours has a living owner; one with our number and another start has none."""
    mark = orphans.mark(ROOT)
    checkout, pid, _ = mark.split(":")

    assert orphans.owner_lives(mark)
    assert not orphans.owner_lives(f"{checkout}:{pid}:1")
    assert not orphans.owner_lives("nonsense")


def test_error_of_a_busy_checkout_is_a_machine_error(tmp_path: Path) -> None:
    """The lock is not re-entrant: the same process cannot hold a checkout twice."""
    at = Layout(tmp_path)

    with (
        repro.alone(at, wait=False),
        pytest.raises(MachineError, match="since"),
        repro.alone(at, wait=False),
    ):
        pass


def test_plan_has_no_stage_twice() -> None:
    """Every expected stage has one line."""
    plan = repro.plan_of(declaration(), [])

    assert len(live.Board(plan.stages).stages) == len(plan.stages)


def test_what_was_not_measured_well_is_measured_again(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An INVALID benchmark is withdrawn before DVC starts; a valid one and other quants stay."""
    at = Layout(checkout)
    declared = load(at.params)
    kept = at.quant_record("benchmark", "tiny-llama", "Q8_0")
    withdrawn = at.quant_record("benchmark", "tiny-llama", "Q4_K_M")
    unreadable = at.quant_record("benchmark", "tiny-llama", "Q2_K")
    other = at.quant_record("benchmark", "tiny-llama", "Q6_K")
    records.write(kept, benchmark_record("Q8_0"))
    for path in (withdrawn, other):
        records.write(path, benchmark_record(path.stem, validity=validity("The box was busy.")))
    unreadable.write_text("{")
    targets = [f"tiny-llama-{path.stem}" for path in (kept, withdrawn, unreadable)]

    repro.withdraw_invalid(at, declared, repro.plan_of(declared, targets))

    assert [path.exists() for path in (kept, withdrawn, unreadable, other)] == [
        True, False, False, True,
    ]  # fmt: skip
    told = capsys.readouterr().err
    assert "measuring again: benchmark@tiny-llama-Q4_K_M was not valid" in told
