"""Composite actions: what they type, and that they work in a repository without the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import act
import pytest
import sample
from ruamel.yaml import YAML
from test_compare import QUICK

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = ROOT / "actions"
CODE = "template/gguf-fleet"
COMMIT = "1" * 40
QUANT = "tiny-llama-Q8_0"
# What a fleet is without the template's code.
FLEET = (
    "params.yaml", "dvc.yaml", "dvc.lock", "pipelines/dvc.yaml", "pipelines/dvc.lock", ".dvc",
    ".dvcignore", ".gitignore", "corpora", "modelfiles", "results", "examples/tiny-llama",
)  # fmt: skip


def action_of(name: str) -> dict[str, Any]:
    """Read the file of an action."""
    found: dict[str, Any] = YAML(typ="safe").load(ACTIONS / name / "action.yml")
    return found


def workflow(steps: list[dict[str, Any]], *, before: str = "./") -> str:
    """Return a workflow of one job: the checkout, the environment, and then these steps."""
    pins = YAML(typ="safe").load(ROOT / ".github/pins.yaml")
    checkout = f"actions/checkout@{pins['actions/checkout']['sha']}"
    named = [
        step if "uses" not in step else {**step, "uses": f"{before}{step['uses']}"}
        for step in [{"id": "setup", "uses": "actions/setup"}, *steps]
    ]
    if before != "./":
        named = [{**s, "uses": f"{s['uses']}@{COMMIT}"} if "uses" in s else s for s in named]
    steps = [{"uses": checkout, "with": {"fetch-depth": 0}}, *named]
    return json.dumps({"on": "push", "jobs": {"one": {"runs-on": act.HOSTED, "steps": steps}}})


def unexplained_outputs(run: act.Run, job: str, step: str, action: str) -> set[str]:
    """Return the outputs that an action declares and its step does not set, and the reverse."""
    declared = set(action_of(action).get("outputs", {}))
    return declared ^ set(run.outputs(job, f"{step}/fleet"))


# --- a repository without the code ------------------------------------------------------------


@pytest.fixture(scope="session", name="elsewhere")
def _elsewhere(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> act.Run:
    """A job of another repository that makes and measures a quant of its own fleet."""
    assert tools.tool("llama-quantize").exists()
    place = tmp_path_factory.mktemp("elsewhere")
    code = act.fork(place)
    fleet = place / "fleet"
    for name in FLEET:
        (fleet / name).parent.mkdir(parents=True, exist_ok=True)
        if (code / name).is_dir():
            shutil.copytree(code / name, fleet / name)
        elif (code / name).exists():
            shutil.copy(code / name, fleet / name)
    shutil.rmtree(fleet / "results")
    params = sample.params_text()
    for key, value in QUICK.items():
        params = re.sub(rf"^( +){key}: .*$", rf"\g<1>{key}: {value}", params, flags=re.MULTILINE)
    dropped = r"^    calibration: calibration\n|^  .*imatrix: true.*\n"
    params = re.sub(dropped, "", params, flags=re.MULTILINE)
    params = params.replace("\nbenchmark:\n", "\nbenchmark:\n  threads: 1\n")
    (fleet / "params.yaml").write_text(params)
    steps: list[dict[str, Any]] = [
        {"id": "quantize", "uses": "actions/quantize", "with": {"models": QUANT}},
        {"id": "benchmark", "uses": "actions/benchmark", "with": {"models": QUANT}},
        {"id": "load", "uses": "actions/load-test", "with": {"models": QUANT}},
        {"id": "look", "run": f"ls work/tiny-llama/gguf/{QUANT}.gguf results/tiny-llama/benchmark"},
    ]  # fmt: skip
    (fleet / ".github/workflows").mkdir(parents=True)
    (fleet / ".github/workflows/one.yml").write_text(workflow(steps, before=f"{CODE}/"))
    act.git(fleet, "init", "-q", "-b", "main")
    act.git(fleet, "config", "uploadpack.allowAnySHA1InWant", "true")
    act.commit(fleet, "fleet")
    return act.act(
        place / "run", fleet, "push", "one.yml", {"ref": "refs/heads/main"},
        actions={f"{CODE}@{COMMIT}": code},
    )  # fmt: skip


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(600)
def test_a_repository_without_the_code_measures_its_fleet(elsewhere: act.Run) -> None:
    """The code is found where the action is, by verbs, by DVC and by every stage below it."""
    assert elsewhere.jobs == {"one": "success"}, elsewhere.text
    assert "look" in {step.id for step in elsewhere.steps("one")}
    assert elsewhere.outputs("one", "quantize/fleet")["ran"].split()[-1] == f"quantize@{QUANT}"
    assert elsewhere.outputs("one", "benchmark/fleet") == {"ran": f"machine benchmark@{QUANT}",
                                                           "failed": ""}  # fmt: skip
    assert elsewhere.outputs("one", "load/fleet")["failed"] == ""
    assert elsewhere.errors == []


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(600)
def test_each_step_says_in_the_summary_what_ran(elsewhere: act.Run) -> None:
    """The summary of the job is written by Python, a short table for each step."""
    told = "\n".join(elsewhere.summaries("one"))

    assert told.count("### fleet repro: ") == 3
    assert f"| quantize@\u200b{QUANT} | done in " in told


@pytest.mark.alone
@pytest.mark.toolchain
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("step", "action"),
    [("setup", "setup"), ("quantize", "quantize"), ("benchmark", "benchmark"),
     ("load", "load-test")],
)  # fmt: skip
def test_the_outputs_of_an_action_are_those_that_it_declares(
    elsewhere: act.Run, step: str, action: str
) -> None:
    """One that maps to nothing is empty for every caller, and nothing says so."""
    assert unexplained_outputs(elsewhere, "one", step, action) == set()


def test_setup_makes_an_environment_of_the_lock_that_later_steps_run_in(tmp_path: Path) -> None:
    """For real, with a lock of one small package: made in the user's cache, named to the job."""
    root = act.fork(tmp_path)
    lock = (root / "requirements.lock").read_text()
    small = re.search(r"^filelock==.*?(?=^\S)", lock, re.DOTALL | re.MULTILINE)
    assert small is not None
    (root / "requirements.lock").write_text(small[0])
    look = "import filelock, sys; print(sys.prefix)"
    steps = [{"id": "look", "run": f"\"$GGUF_FLEET_VENV/bin/python\" -c '{look}'"}]
    (root / ".github/workflows/one.yml").write_text(workflow(steps))
    act.commit(root, "a small lock")
    cache = tmp_path / "cache"
    # How this machine reaches a package registry.
    ways = re.compile(r"(?i)(PIP_|UV_|SSL_CERT_|REQUESTS_CA_).*|.*_proxy")
    registries = {key: value for key, value in os.environ.items() if ways.fullmatch(key)}

    run = act.act(
        tmp_path / "run", root, "push", "one.yml", {"ref": "refs/heads/main"},
        env={**registries, "GGUF_FLEET_VENV": "", "GGUF_FLEET_CACHE": str(cache)},
    )  # fmt: skip

    if run.rc and not any(step.id == "look" for step in run.steps("one")):
        log = "".join(path.read_text() for path in cache.glob("environments/*.log"))
        if re.search(r"(?i)connect|resolve host|name resolution|timed out", log):
            pytest.skip("no package registry can be reached")
    assert run.jobs == {"one": "success"}, run.text
    (venv,) = (path for path in (cache / "environments").iterdir() if path.is_dir())
    assert run.outputs("one", "setup/fleet") == {"venv": str(venv)}
    assert str(venv) in run.text.split("Main look")[-1]


# --- the files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in ACTIONS.iterdir() if path.is_dir()))
def test_what_an_action_types_is_understood_by_the_command_line(name: str) -> None:
    """Each option of its line exists, and every word that is needed is there."""
    (step,) = action_of(name)["runs"]["steps"]
    env: Mapping[str, str] = step["env"]
    given = {key: _example(key, value) for key, value in env.items()}
    fake = """
import sys
from pipelines import __main__, bootstrap
if sys.argv[1] == "bootstrap":
    bootstrap.set_up_shared = lambda profile: sys.exit(print("understood"))
    sys.argv = sys.argv[1:]
    bootstrap.main()
args = __main__.parser().parse_args(sys.argv[1:])
print("understood", args.verb)
"""
    line = step["run"].replace('exec "$GITHUB_ACTION_PATH/../fleet"', '"$PYTHON" -c "$FAKE"')

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        env={"PYTHON": sys.executable, "FAKE": fake, "PYTHONPATH": str(ROOT), **given},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("understood")


def _example(key: str, value: str) -> str:
    """Return a value for a variable of an action: a hostile one where any text may stand."""
    known = {
        "FLEET_PROFILE": "base", "FLEET_TOOLCHAIN": "false", "FLEET_PLAN_RESULT": "success",
        "FLEET_MEASURED": "skipped", "FLEET_USE": "probe", "FLEET_PUSH": "--no-push",
        "FLEET_GITHUB": "look", "FLEET_VRAM": "24576", "FLEET_MEMORY": "",
    }  # fmt: skip
    assert value.startswith("${{ inputs.")
    return known.get(key, "a $(touch hacked) `id`; --help \n::error::x")


def test_without_an_environment_the_step_says_which_one_is_missing(tmp_path: Path) -> None:
    """Whoever forgot actions/setup reads that, and no traceback."""
    done = subprocess.run(
        [ACTIONS / "fleet", "check"],
        env={"PATH": "/usr/bin:/bin", "GGUF_FLEET_VENV": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 7
    assert done.stderr.startswith("::error::there is no Python environment in")
    assert "actions/setup" in done.stderr


def test_a_cancel_reaches_the_verb_and_nothing_is_left(tmp_path: Path) -> None:
    """GitHub signals the process of the step alone, and kills all of them after 10 s."""
    step = action_of("quantize")["runs"]["steps"][0]
    (tmp_path / "script.sh").write_text(step["run"])
    # A verb that sleeps: what `python -m pipelines` runs where a checkout has code of its own.
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").touch()
    slow = "import sys, time\ntry: print('ready', flush=True), time.sleep(60)\n"
    slow += "except KeyboardInterrupt: sys.exit(print('ended by us') or 130)\n"
    (tmp_path / "pipelines/__main__.py").write_text(slow)
    job = subprocess.Popen(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", tmp_path / "script.sh"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={"PATH": os.environ["PATH"], "GITHUB_ACTION_PATH": str(ACTIONS / "quantize"),
             "GGUF_FLEET_VENV": sys.prefix, "FLEET_MODELS": "x"},
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"

    job.send_signal(signal.SIGINT)
    said, _ = job.communicate(timeout=10)

    assert (job.returncode, said) == (130, "ended by us\n")
