"""The benchmark of our own overhead replays what the stages ran, and nothing else."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from bench.overhead import replay

if TYPE_CHECKING:
    from pathlib import Path

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
