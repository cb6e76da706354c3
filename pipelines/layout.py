"""
The only place that spells a path of the repository: (stage, key) -> files.

    results/   small records, in git, reviewed in pull requests
    work/      large files and everything that a machine can make again, in DVC's cache only

`dvc.yaml` spells the same paths; `tests/test_dvc_yaml.py` holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# What the record of a stage is called, where it is not the stage's own word.
_RECORD_WORDS = {"choose": "choice"}


@dataclass(frozen=True)
class Layout:
    """Paths below the root of one checkout. All are relative if `root` is."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """The declaration."""
        return self.root / "params.yaml"

    @property
    def prompts(self) -> Path:
        """Conversations and questions by which a served model is checked."""
        return self.root / "corpora/prompts.yaml"

    @property
    def laid(self) -> Path:
        """Whose records were laid in results/MODEL, if not those of the first host; not in git."""
        return self.root / "work/host.json"

    @property
    def machine(self) -> Path:
        """What this machine is: the hardware that a benchmark depends on."""
        return self.root / "work/machine.json"

    @property
    def toolchain(self) -> Path:
        """What the tools are: commit, flags, digests."""
        return self.root / "work/toolchain.json"

    def slice(self, stage: str, key: str) -> Path:
        """The resolved parameters of one stage and key, which DVC tracks."""
        return self.root / "work/params" / stage / f"{key}.json"

    def log(self, stage: str, key: str) -> Path:
        """Whole output of every program that the stage started."""
        return self.root / "work/logs" / f"{stage}-{key}.log"

    @property
    def downloads(self) -> Path:
        """Directory of files that are not here as a whole yet, each named by its digest."""
        return self.root / "work/downloads"

    def source(self, model: str) -> Path:
        """Directory with the verified files of the pinned upstream revision."""
        return self.root / "work" / model / "source"

    def f16(self, model: str) -> Path:
        """The converted model in 16 bits, from which every quant is made."""
        return self.root / "work" / model / "f16.gguf"

    def imatrix_dir(self, model: str) -> Path:
        """Directory that holds imatrix.gguf, or nothing if the model declares no calibration."""
        return self.root / "work" / model / "imatrix"

    def imatrix(self, model: str) -> Path:
        """The importance matrix."""
        return self.imatrix_dir(model) / "imatrix.gguf"

    def gguf(self, model: str, key: str) -> Path:
        """A quantized model: <model>-<TYPE>.gguf, the Hub's naming habit."""
        return self.root / "work" / model / "gguf" / f"{key}.gguf"

    def scratch(self, model: str) -> Path:
        """Large files that only save time and that anybody may delete at any moment."""
        return self.root / "work/scratch" / model

    @property
    def serving(self) -> Path:
        """Directory of what each running server keeps; on the file system of the GGUFs."""
        return self.root / "work/serving"

    def model_record(self, stage: str, model: str) -> Path:
        """Record of a stage that runs once for each model."""
        return self.root / "results" / model / f"{_RECORD_WORDS.get(stage, stage)}.json"

    def quant_record(self, stage: str, model: str, type_: str) -> Path:
        """Record of a stage that runs once for each quant."""
        return self.root / "results" / model / stage / f"{type_}.json"

    def sweep_record(self, model: str, type_: str) -> Path:
        """Speed of a quant over the layers on the GPU, beside its benchmark, if it was swept."""
        return self.root / "results" / model / "benchmark" / f"{type_}.gpu-layers.json"

    def frontier(self, model: str) -> Path:
        """Size, speed and divergence of every measured quant, as rows that `dvc plots` draws."""
        return self.root / "results" / model / "frontier.json"

    def metrics(self, model: str) -> Path:
        """The headline numbers of every measured quant, for `dvc metrics diff`."""
        return self.root / "results" / model / "metrics.json"

    def load_metrics(self, model: str) -> Path:
        """The headline numbers of the load test, for `dvc metrics diff`."""
        return self.root / "results" / model / "load-test-metrics.json"

    def release(self, model: str) -> Path:
        """The newest release: the very bytes whose sha256 is its id."""
        return self.root / "results" / model / "release.json"

    def ledger(self, model: str) -> Path:
        """Every move of an alias and every waiver, one line each; appended to, never rewritten."""
        return self.root / "results" / model / "ledger.jsonl"

    def comparison(self, model: str) -> Path:
        """Champion against challenger, with every sample; written by `fleet compare` alone."""
        return self.root / "results" / model / "compare.json"

    def engine_record(self, model: str) -> Path:
        """Old engine against new one on the same GGUF; beside the comparison that it belongs to."""
        return self.root / "results" / model / "engine.json"

    def tools_record(self, model: str) -> Path:
        """What the tools were that made its records: `toolchain`, byte for byte, in git."""
        return self.root / "results" / model / "toolchain.json"

    def times(self, model: str) -> Path:
        """How long its stages took when they last ran, for the budget of a plan."""
        return self.root / "results" / model / "times.json"

    def on_hosts(self, model: str) -> Path:
        """Directory of what other measured hosts than the first found: HOST/**."""
        return self.root / "results" / model / "on"

    def compared(self, model: str) -> Path:
        """Which comparison there is of a model, as the probe finds it at every run."""
        return self.root / "work/compared" / f"{model}.json"

    def observed(self, model: str) -> Path:
        """What the local registry holds of a model, as the probe finds it at every run."""
        return self.root / "work/published" / f"{model}.json"

    def receipt(self, model: str) -> Path:
        """What the tracking server has been told about a model."""
        return self.root / "work/track" / f"{model}.json"

    def of_quant(self, model: str, key: str, type_: str) -> tuple[Path, ...]:
        """Everything that the stages write of one quant and of nothing else."""
        return (
            self.quant_record("quantize", model, type_),
            self.quant_record("benchmark", model, type_),
            self.sweep_record(model, type_),
            self.gguf(model, key),
        )

    def of_model(self, model: str) -> tuple[Path, ...]:
        """Everything that the stages write of one model and of none of its quants."""
        # Not release and ledger: what was once served stays on record.
        stages = (
            "fetch", "convert", "verify", "calibrate", "evaluate", "choose", "load-test", "publish",
        )  # fmt: skip
        return (
            *(self.model_record(stage, model) for stage in stages),
            self.metrics(model),
            self.load_metrics(model),
            self.frontier(model),
            self.comparison(model),
            self.engine_record(model),
            self.tools_record(model),
            self.times(model),
            self.on_hosts(model),
            self.compared(model),
            self.observed(model),
            self.receipt(model),
            self.source(model),
            self.f16(model),
            self.imatrix_dir(model),
            self.scratch(model),
        )

    @property
    def upstream(self) -> Path:
        """What the last look at upstream found; not in git, since the next look makes it again."""
        return self.root / "results/upstream.json"

    @property
    def upstream_notices(self) -> Path:
        """What the report says of upstream: without times, so that it changes when facts do."""
        return self.root / "work/upstream.json"

    @property
    def report_markdown(self) -> Path:
        """The report for a terminal, a pull request, a job summary."""
        return self.root / "results/report.md"

    @property
    def report_html(self) -> Path:
        """The report as one self-contained page."""
        return self.root / "results/report.html"
