"""The benchmark of our own overhead measures what it says, and fails where it cannot."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from ruamel.yaml import YAML

from bench import chain, fork, noop, overhead
from bench.chain import replay

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain

PROBED = (
    "Running stage 'pipelines/dvc.yaml:machine':\n> python -m pipelines machine\n"
    "Running stage 'pipelines/dvc.yaml:check-upstream':\n> python -m pipelines check-upstream\n"
)
SKIPPED = "Stage 'fetch@m0' didn't change, skipping\nStage 'convert@m0' didn't change, skipping\n"
# Logs as `pipelines.proc` writes them: commands with their folder, quoted words over several lines.
CONVERT = """\
+ /opt/python -c '
import runpy
runpy.run_path("x")
' /opt/tools/convert_hf_to_gguf.py work/scratch/m/convert/m --outfile work/m/.f16.gguf.part \
--outtype f16 --model-name m --metadata work/scratch/m/convert/metadata.json
INFO: done
"""
BENCHMARK = """\
+ cd . && /opt/tools/bin/llama-bench -m work/m/gguf/m-Q8_0.gguf -p 128
+ cd . && /opt/python -I -S -c 'import ctypes
main()
' /opt/tools/lib/impl.so /opt/tools/bin/llama-perplexity --save-all-logits work/s/.logits-1.kld.part
+ cd . && /opt/tools/bin/llama-perplexity --kl-divergence-base work/s/logits-1.kld
"""
OTHERS = """\
+ cd . && git show HEAD:./results/tiny-llama/choice.json
+ /opt/python -m pipelines.mlflow_runs work/scratch/tiny-llama/track.json
"""


def test_only_the_tools_are_typed_again_without_our_launchers(tmp_path: Path) -> None:
    """Git and MLflow are ours; converter and divergence are llama.cpp's, however we start them."""
    logs = tmp_path / "work/logs"
    logs.mkdir(parents=True)
    (logs / "convert-m.log").write_text(CONVERT)
    (logs / "choose-tiny-llama.log").write_text(OTHERS)
    (logs / "benchmark-m.log").write_text(BENCHMARK)

    commands = {tuple(argv) for _, argv in replay(tmp_path)}

    tools = "/opt/tools/bin"
    assert commands == {
        (
            *(sys.executable, "/opt/tools/convert_hf_to_gguf.py", "work/m/source"),
            *("--outfile", "work/m/.f16.gguf.part", "--outtype", "f16", "--model-name", "m"),
        ),
        (f"{tools}/llama-bench", "-m", "work/m/gguf/m-Q8_0.gguf", "-p", "128"),
        (f"{tools}/llama-perplexity", "--save-all-logits", "work/s/.logits-1.kld.part"),
        (f"{tools}/llama-perplexity", "--kl-divergence-base", "work/s/.logits-1.kld.part"),
    }
    assert (tmp_path / "work/s").is_dir()


@pytest.mark.parametrize("did", ["Running stage 'track@m0':", "Stage 'track@m0' is cached - skip"])
def test_a_noop_in_which_a_stage_ran_gives_no_figure(did: str) -> None:
    """Only what always runs may run; a stage that DVC brings out of its run cache was work, too."""
    noop.require_noop(PROBED + SKIPPED, 0, "", 2)

    with pytest.raises(SystemExit, match=r"1 stages ran \(track@m0\), and 2 of 3"):
        noop.require_noop(f"{PROBED}{SKIPPED}{did}\n", 0, "", 3)


@pytest.mark.parametrize(
    ("said", "code", "why"),
    [(PROBED + SKIPPED, 255, "exit code 255: boom"), (PROBED, 0, "0 of 2 were looked at")],
)
def test_a_noop_that_failed_or_saw_too_little_gives_no_figure(
    said: str, code: int, why: str
) -> None:
    """A quick failure would be the best figure of all."""
    with pytest.raises(SystemExit, match=why):
        noop.require_noop(said, code, "boom", 2)


@pytest.mark.toolchain
def test_the_fleet_of_the_noop_is_one_in_which_nothing_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tools: Toolchain
) -> None:
    """Both DVCs skip every stage of it; after a change of one file they do not."""
    monkeypatch.setattr(noop, "MODELS", 1)
    monkeypatch.setattr(noop, "QUANTS", ("Q8_0",))
    monkeypatch.setattr(noop, "FAKE_WEIGHTS_BYTES", 1 << 10)
    monkeypatch.setattr(noop, "REPEATS", 1)
    root = tmp_path / "fork"

    figures = noop.noop(root)

    assert tools.manifest
    assert figures["weights_bytes"] == 4 << 10  # source, 16-bit GGUF, matrix, quant
    for name in noop.COMMANDS:
        assert len(figures[name]["wall_s_all"]) == 1
        assert figures[name]["read_bytes"] > 0
    (root / "results/m0/choice.json").write_text("{}")
    with pytest.raises(SystemExit):
        noop.one_noop(root, "dvc", figures["stages_count"])


def test_the_chain_is_measured_without_the_load_test_and_its_release(tmp_path: Path) -> None:
    """Their stages and what they make are gone from the fork's graph; nothing else is."""
    shutil.copy(fork.ROOT / "dvc.yaml", tmp_path)
    before = YAML(typ="safe").load(tmp_path / "dvc.yaml")["stages"]

    chain.without_load_test(tmp_path)

    after = json.loads((tmp_path / "dvc.yaml").read_text())["stages"]
    assert set(before) - set(after) == {"load-test", "publish"}
    assert "load-test" not in json.dumps(after)
    assert "publish" not in json.dumps(after)
    assert after["convert"] == before["convert"]


def test_no_record_is_made_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of a machine that does something else is worse than none."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 9.0, 9.0))
    overhead.require_quiet()
    monkeypatch.setattr("os.getloadavg", lambda: (2.1, 0.0, 0.0))

    with pytest.raises(SystemExit, match="busy"):
        overhead.require_quiet()
