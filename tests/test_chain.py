"""The whole chain on the embedded model, with the real graph, DVC, llama.cpp and MLflow."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(1800)]

MODEL = "tiny-llama"
# Small numbers: these tests are about what runs, not about how fast.
QUICK = {
    "prompt_tokens": "32", "generate_tokens": "8", "depths": "[0, 32]", "repetitions": "4",
    "dropped_repetitions": "1", "chunks": "16",
}  # fmt: skip
# Fewer requests of each kind, where the shipped declaration states none.
FEW = """\
  concurrency: [1]
  requests: 10
  open_requests: 20
  warm_up_requests: 1
  smoke_requests: 1
  degenerate_prompts: 8
"""
# Less text for what is made before the first quant.
SHORT = """\
calibrate: {chunks: 16}

verify: {logits_tokens: 64}

"""
# A new network namespace has its loopback down: no server on it would answer its own client.
ONLY_LOOPBACK = """
import fcntl, os, socket, struct, sys
up, set_flags = 0x1 | 0x40, 0x8914  # IFF_UP | IFF_RUNNING, SIOCSIFFLAGS of linux/sockios.h
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))
os.execv(sys.executable, [sys.executable, "-m", "pipelines", "repro"])
"""
ALWAYS = {"pipelines/dvc.yaml:machine", "pipelines/dvc.yaml:check-upstream"}
CHOICE_AND_AFTER = {
    *(f"{stage}@{MODEL}" for stage in ("choose", "load-test", "publish", "track")),
    "report",
}
ROOT = Path(__file__).resolve().parent.parent


def run(root: Path, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of our environment in a checkout, as a user whose venv is active does."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def ran(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Stages that DVC really ran, without those that look around every time."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    found = set(re.findall(r"Running stage '([^']+)'", text))
    return found - ALWAYS


def dvc_repro(root: Path, *targets: str) -> set[str]:
    """Run plain `dvc repro` and return what it ran."""
    return ran(run(root, "dvc", "repro", *targets))


def edit(root: Path, change: Callable[[str], str], name: str = "params.yaml") -> None:
    """Edit a file as an operator does."""
    path = root / name
    before = path.read_text()
    after = change(before)
    assert after != before
    path.write_text(after)


def quick(text: str) -> str:
    """Make every measurement of params.yaml short."""
    text, count = re.subn(r"^  concurrency: .*\n", FEW, text, flags=re.MULTILINE)
    assert count == 1
    text, count = re.subn(r"^benchmark:\n", rf"{SHORT}\g<0>", text, flags=re.MULTILINE)
    assert count == 1
    for key, value in QUICK.items():
        text, count = re.subn(rf"\b({key}: )(?:\[[^\]]*\]|[^,}}\n#]+)", rf"\g<1>{value}", text)
        assert count, key
    return without(text, "Q6_K")


def without(text: str, *types: str) -> str:
    """Declare these quants no more."""
    for type_ in types:
        text, count = re.subn(rf"^  {MODEL}-{type_}: .*\n", "", text, flags=re.MULTILINE)
        assert count == 1, type_
    return text


def few_tasks(root: Path) -> None:
    """Leave one in six tasks of the evals: each quant does all of them."""
    path = root / "corpora/evals/technical-english.jsonl"
    before = path.read_bytes()
    after = b"".join(before.splitlines(keepends=True)[::6])
    path.write_bytes(after)
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, after))
    edit(root, lambda text: text.replace(old, new))


def digests(root: Path) -> dict[str, str]:
    """Sha256 of every quantized GGUF, by type, as the records say."""
    folder = root / "results" / MODEL / "quantize"
    return {path.stem: json.loads(path.read_text())["gguf"]["sha256"] for path in folder.iterdir()}


@pytest.fixture(scope="session", name="finished")
def _finished(
    tmp_path_factory: pytest.TempPathFactory, tools: Toolchain
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A fork in which `fleet repro` has run once, and what it printed."""
    assert tools.tool("llama-quantize").exists()
    root = tmp_path_factory.mktemp("chain") / "fork"
    sample.take(root, *sample.CHECKOUT)
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    for argv in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "template"]):
        subprocess.run(["git", *author, *argv], cwd=root, check=True)
    edit(root, quick)
    few_tasks(root)
    return root, run(root, "pipelines", "repro")


@pytest.fixture(name="fork")
def _fork(finished: tuple[Path, object], tmp_path: Path) -> Path:
    """A copy of the finished fork, to change."""
    root = tmp_path / "fork"
    shutil.copytree(finished[0], root, symlinks=True)
    return root


def test_one_command_ends_with_the_report(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """`fleet repro` makes every GGUF, record and report, and prints the choice."""
    root, done = finished

    declared = set(
        re.findall(rf"^  {MODEL}-(\S+?):", (root / "params.yaml").read_text(), re.MULTILINE)
    )
    assert set(digests(root)) == declared
    for type_ in declared:
        gguf = root / "work" / MODEL / "gguf" / f"{MODEL}-{type_}.gguf"
        assert gguf.read_bytes()[:4] == b"GGUF"
        assert (root / "results" / MODEL / "benchmark" / f"{type_}.json").exists()
    choice = json.loads((root / "results" / MODEL / "choice.json").read_text())
    sentences = {c["type"]: c["sentence"] for c in choice["hosts"][0]["candidates"]}
    assert set(sentences) == declared
    assert all(sentences.values())
    assert (root / "results/report.md").read_text().startswith("#")
    assert "<html" in (root / "results/report.html").read_text()
    assert MODEL in done.stdout


def test_the_chosen_quant_was_served_by_a_real_engine_byte_for_byte(
    finished: tuple[Path, object],
) -> None:
    """The record holds the digest of the chosen file, and the manifest's that the server listed."""
    root, _ = finished
    tested = json.loads((root / "results" / MODEL / "load-test.json").read_text())
    (winner,) = tested["winners"]

    assert winner["served"]["gguf_sha256"] == digests(root)[winner["type"]]
    assert winner["served"]["context_tokens"] == tested["context_tokens"]
    assert {one["outcome"] for one in winner["golden"]["prompts"]} == {"PASS", "SKIPPED"}
    assert [run["kind"] for run in winner["runs"]] == ["closed", "open"]
    assert winner["runs"][-1]["requests_count"] == 20
    if shutil.which("go") or Path("/usr/local/go/bin/go").exists():
        assert tested["engine"]["kind"] == "ollama"
        assert re.fullmatch(r"[0-9a-f]{64}", winner["served"]["manifest_sha256"])
    assert not list((root / "work/serving").iterdir())


def test_the_run_ends_with_a_release_or_says_why_not(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """What was promoted is in the local registry, every byte, under the id that is printed."""
    root, done = finished
    record = json.loads((root / "results" / MODEL / "publish.json").read_text())
    (said,) = re.findall(rf"^{MODEL}: ((?:not )?released\b.*)$", done.stdout, re.MULTILINE)

    if record["status"] == "refused":  # a busy machine may have disturbed a measurement
        assert said.startswith("not released: ")
        assert record["reasons"]
        return
    data = (root / "results" / MODEL / "release.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == record["release"] == record["stable"]
    assert said == f"released {record['release'][:12]} (stable) in local, file:registry."
    for file in json.loads(data)["files"]:
        blob = (root / "registry/blobs/sha256" / file["sha256"]).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == file["sha256"]


def test_mlflow_holds_one_run_for_each_quant(finished: tuple[Path, object]) -> None:
    """Every measured quant is a run in the tracking store, found by the digest of its GGUF."""
    root, _ = finished
    receipt = json.loads((root / "work/track" / f"{MODEL}.json").read_text())

    assert receipt["status"] == "tracked"
    assert len(receipt["runs"]) == len(digests(root))


def test_divergence_orders_the_quants_as_on_real_models(finished: tuple[Path, object]) -> None:
    """Q8_0 is closest to f16 and Q2_K farthest, with the four-bit types between them."""
    root, _ = finished
    folder = root / "results" / MODEL / "benchmark"
    kld = {
        path.stem: json.loads(path.read_text())["quality"]["kld_mean_nats"]
        for path in folder.iterdir()
    }

    assert kld["Q8_0"] < kld["Q4_K_M"] < kld["Q2_K"]
    assert kld["Q8_0"] < kld["IQ4_XS"] < kld["Q2_K"]


def test_a_second_run_does_nothing(fork: Path) -> None:
    """When nothing changed, `dvc repro` runs no stage but those that look whether it did."""
    assert dvc_repro(fork) == set()


def test_a_new_quant_is_one_line_and_so_is_its_end(fork: Path) -> None:
    """A line in params.yaml adds a quant, and nothing else runs; without the line it is gone."""
    line = f"  {MODEL}-Q5_K_S: {{model: {MODEL}, type: Q5_K_S}}\n"
    edit(fork, lambda text: re.sub(r"^quants:\n", f"quants:\n{line}", text, flags=re.MULTILINE))

    done = run(fork, "pipelines", "repro")

    log = (fork / "work/logs/repro-fleet.log").read_text()
    # On a busy machine a measurement may have been INVALID before: it is made again, and said so.
    again = set(re.findall(r"measuring again: (\S+) was not valid", done.stderr))
    assert set(re.findall(r"Running stage '([^']+)'", log)) - again - ALWAYS == {
        f"quantize@{MODEL}-Q5_K_S",
        f"benchmark@{MODEL}-Q5_K_S",
        f"evaluate@{MODEL}",
        *CHOICE_AND_AFTER,
    }
    assert "Q5_K_S" in digests(fork)
    assert "Q5_K_S" in (fork / "results/report.md").read_text()

    edit(fork, lambda text: text.replace(line, ""))

    assert dvc_repro(fork) == {f"evaluate@{MODEL}", *CHOICE_AND_AFTER}
    assert "Q5_K_S" not in (fork / "results" / MODEL / "choice.json").read_text()
    assert "Q5_K_S" not in (fork / "results/report.md").read_text()


def test_a_comment_in_a_module_runs_nothing(fork: Path) -> None:
    """Editing the wording of our code does not make a fleet quantize again."""
    for name in ("quantize", "convert", "benchmark", "params"):
        edit(fork, lambda text: text + "\n# A comment.\n", f"pipelines/{name}.py")

    assert dvc_repro(fork) == set()


def test_a_comment_in_params_runs_nothing(fork: Path) -> None:
    """A comment or a reordered line in params.yaml changes no slice and so runs no stage."""
    edit(fork, lambda text: text + "\n# A comment.\n")

    assert dvc_repro(fork) == set()


def test_a_gate_edit_only_chooses_again(fork: Path) -> None:
    """Gates decide the choice; no GGUF is made or measured again for them."""
    edit(fork, lambda text: re.sub(r"max_ppl_ratio: [0-9.]+", "max_ppl_ratio: 1.5", text, count=1))

    assert dvc_repro(fork) == CHOICE_AND_AFTER


def test_a_new_recipe_makes_everything_after_fetch_again(fork: Path) -> None:
    """`toolchain.recipe` is the switch that rebuilds the fleet without fetching it."""
    edit(fork, lambda text: without(text, "Q4_K_M", "Q2_K"))
    edit(fork, lambda text: re.sub(r"recipe: \d+", "recipe: 2", text))

    found = dvc_repro(fork)

    stages = {name.partition("@")[0] for name in found}
    assert stages >= {
        "convert",
        "verify",
        "calibrate",
        "quantize",
        "benchmark",
        "evaluate",
        "choose",
        "load-test",
        "publish",
        "track",
    }
    assert "fetch" not in stages
    made = {name for name in found if name.startswith("quantize@")}
    assert made == {f"quantize@{MODEL}-{type_}" for type_ in ("Q8_0", "IQ4_XS")}


def test_a_revert_makes_nothing_twice(fork: Path) -> None:
    """Back on an earlier declaration, GGUFs come from the cache: nothing is converted again."""
    edit(fork, lambda text: re.sub(r"recipe: \d+", "recipe: 2", text))
    dvc_repro(fork, f"quantize@{MODEL}-Q8_0")
    edit(fork, lambda text: re.sub(r"recipe: \d+", "recipe: 1", text))

    assert dvc_repro(fork, f"quantize@{MODEL}-Q8_0") == set()


def test_two_runs_from_scratch_give_the_same_bytes(
    fork: Path, finished: tuple[Path, object]
) -> None:
    """Everything made again without any cache: each GGUF is byte for byte the same."""
    shutil.rmtree(fork / "work")
    shutil.rmtree(fork / ".dvc/cache")
    shutil.rmtree(fork / "results")
    (fork / "dvc.lock").unlink()
    keys = [f"quantize@{MODEL}-{type_}" for type_ in digests(finished[0])]

    assert set(keys) <= dvc_repro(fork, *keys)

    assert digests(fork) == digests(finished[0])


def test_no_path_of_this_machine_is_published(finished: tuple[Path, object]) -> None:
    """No record and no GGUF names a folder, a user or a host of the machine that made it."""
    root, _ = finished
    needles = [str(root).encode(), str(Path.home()).encode() + b"/"]
    host = os.uname().nodename.encode()
    # Two letters of a short name stand in any megabyte of weights by chance.
    needles += [host] if len(host) > 5 else []
    files = [*(root / "results").rglob("*"), *(root / "work" / MODEL).rglob("*.gguf")]

    for path in files:
        if path.is_file():
            content = path.read_bytes()
            assert not [needle for needle in needles if needle in content], path


def test_nothing_of_a_network_is_needed(fork: Path) -> None:
    """With no network but the machine's own loopback a new quant is made, measured and served."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("taking the network away needs root and unshare")
    # A busy machine may have disturbed the others: that they are measured again is not tested here.
    edit(fork, lambda text: without(text, "Q4_K_M", "IQ4_XS", "Q2_K"))
    line = f"  {MODEL}-Q4_0: {{model: {MODEL}, type: Q4_0}}\n"
    edit(fork, lambda text: re.sub(r"^quants:\n", f"quants:\n{line}", text, flags=re.MULTILINE))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))

    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", ONLY_LOOPBACK],
        cwd=fork, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert "Q4_0" in digests(fork)


@pytest.mark.parametrize("command", [("dvc", "metrics", "show"), ("dvc", "plots", "show")])
def test_dvc_itself_shows_something_useful(fork: Path, command: tuple[str, ...]) -> None:
    """`dvc metrics` and `dvc plots` work on the results without any set-up."""
    done = run(fork, *command)

    text = done.stdout + done.stderr
    assert "Q4_K_M" in text or "file://" in text
