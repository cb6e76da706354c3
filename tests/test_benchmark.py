"""
A benchmark is a whole record of trusted numbers, or an error and nothing half-done.

Most tests run the real tools on a model with random weights. Faults that the real tools do not
show on demand come from a small program in the place of one of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from fake_tools import with_fake
from gguf_factory import converted_model, tiny_llama_gguf

from pipelines import (
    benchmark,
    console,
    gguf_header,
    hashing,
    llama_bench,
    llama_perplexity,
    measuring,
    proc,
    records,
    validity,
)
from pipelines.benchmark import Bench
from pipelines.errors import DigestError, FleetError, MachineError, ParamsError, ToolError
from pipelines.layout import Layout
from pipelines.params import Benchmark, BenchmarkSlice, Corpus, Quality
from pipelines.records import BenchmarkRecord, FileDigest, QualityResult, QuantizeRecord
from pipelines.toolchain import Toolchain

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix a potion of frogs "
real = pytest.mark.toolchain

# Programs in the place of llama-perplexity. The second writes good logits and no result.
CUT_LOGITS = (
    "code = run(); p = Path(argv[argv.index('--save-all-logits') + 1]);"
    "p.write_bytes(p.read_bytes()[:-1]); sys.exit(code)"
)
NO_STATISTICS = """
if '-f' not in argv:
    sys.exit(0)
said = ''
while 'Final estimate' not in said:  # the program by itself loses its last words at times
    said = subprocess.run([real, *argv], capture_output=True, text=True).stderr
print(said, file=sys.stderr)
"""


def slice_of(at: Layout, type_: str = "Q8_0", **changes: Any) -> BenchmarkSlice:
    """Return a benchmark that takes a second: 4 windows, 3 repetitions, two depths."""
    corpus = at.root / "corpora/evaluation.txt"
    declared: dict[str, Any] = {
        "prompt_tokens": 16,
        "generate_tokens": 4,
        "depths": (0, 16),
        "repetitions": 3,
        "dropped_repetitions": 1,
        "threads": 2,
        "batch_tokens": 128,
        "ubatch_tokens": 128,
        "quality": Quality(context_tokens=64, chunks=4),
    }
    fields: dict[str, Any] = {
        "key": f"tiny-{type_}",
        "model": "tiny",
        "type": type_,
        "recipe": 1,
        "context_tokens": 256,
        "corpus": Corpus(path="corpora/evaluation.txt", sha256=hashing.digest(corpus).sha256),
    }
    own = {name: value for name, value in changes.items() if name not in fields}
    fields |= {name: value for name, value in changes.items() if name in fields}
    return BenchmarkSlice(benchmark=Benchmark(**(declared | own)), **fields)


def file_digest(path: Path) -> FileDigest:
    """Return what a record says about a file."""
    found = hashing.digest(path)
    return FileDigest(
        name=path.name, size_bytes=found.size_bytes, sha256=found.sha256, md5=found.md5
    )


def add_quant(at: Layout, type_: str, tools: Toolchain) -> None:
    """Leave a quant and its record as the stage `quantize` does."""
    path = at.gguf("tiny", f"tiny-{type_}")
    path.parent.mkdir(parents=True, exist_ok=True)
    proc.run(
        [tools.tool("llama-quantize"), at.f16("tiny"), path, type_, "1"],
        log=at.log("quantize", type_),
    )
    header = gguf_header.read(path)
    record = QuantizeRecord(
        key=f"tiny-{type_}",
        model="tiny",
        type=type_,
        f16_sha256=hashing.digest(at.f16("tiny")).sha256,
        llama_cpp_commit=tools.commit,
        recipe=1,
        imatrix_sha256=None,
        imatrix_corpus_sha256=None,
        bits_per_weight=header.bits_per_weight(),
        tensors_count=len(header.tensors),
        tensor_types=header.type_counts(),
        tensor_bytes=header.type_bytes(),
        rules=(),
        fallbacks=(),
        gguf=file_digest(path),
    )
    records.write(at.quant_record("quantize", "tiny", type_), record)


@pytest.fixture(scope="module")
def made(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A fleet with one model and two quants, which is copied, not changed."""
    at = converted_model(tmp_path_factory.mktemp("made") / "fleet")
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(WORDS * 20)
    for type_ in ("Q8_0", "Q2_K"):
        add_quant(at, type_, tools)
    return at


@pytest.fixture
def at(made: Layout, tmp_path: Path) -> Layout:
    """A copy of that fleet, in which nothing was measured yet."""
    unmeasured = shutil.ignore_patterns("scratch", "logs")
    shutil.copytree(made.root, tmp_path / "fleet", ignore=unmeasured)
    return Layout(tmp_path / "fleet")


@pytest.fixture(scope="module")
def measured(made: Layout, tools: Toolchain) -> BenchmarkRecord:
    """The whole benchmark of one quant, run once."""
    return benchmark.benchmark(slice_of(made), made, tools, lock=made.root / "lock")


def bench_of(at: Layout, tools: Toolchain, type_: str = "Q8_0", **changes: Any) -> Bench:
    """Return a benchmark as it is before its first part."""
    wanted = slice_of(at, type_, **changes)
    quantized = records.read(at.quant_record("quantize", "tiny", type_), QuantizeRecord)
    return Bench(
        wanted=wanted,
        at=at,
        tools=tools,
        model_size_bytes=sum(quantized.tensor_bytes.values()),
        execution=benchmark.execution(wanted.benchmark, tools.backend, cores=2),
    )


def divergence(bench: Bench) -> llama_perplexity.Divergence:
    """Measure the quality of a quant."""
    return benchmark.measure_quality(bench, file_digest(bench.at.f16("tiny")))[1]


def faulty(folder: Path, tools: Toolchain, name: str, body: str) -> Toolchain:
    """Return the real toolchain with one program replaced."""
    fake = with_fake(folder / "one", tools, name, body)
    prefix = folder / "prefix"
    (prefix / "bin").mkdir(parents=True)
    for tool in tools.manifest["tools"]:
        source = fake.prefix / "bin" / tool if tool == name else tools.tool(tool)
        (prefix / "bin" / tool).symlink_to(source)
    if name != "llama-perplexity":
        (prefix / "lib").symlink_to(tools.prefix / "lib")
    return Toolchain(prefix=prefix, manifest=tools.manifest)


def logits(at: Layout) -> list[Path]:
    """List the whole files of logits."""
    return sorted(at.scratch("tiny").glob("*.kld"))


# --- the record -------------------------------------------------------------------------------


@pytest.mark.alone
@real
def test_record_holds_everything_that_was_measured(
    measured: BenchmarkRecord, made: Layout, tools: Toolchain
) -> None:
    """Speed at each depth with all samples, divergence, memory, machine, and whose bytes it was."""
    assert [(s.test, s.depth_tokens, s.tokens) for s in measured.speed] == [
        ("prefill", 0, 16),
        ("decode", 0, 4),
        ("prefill", 16, 16),
        ("decode", 16, 4),
    ]
    for speed in measured.speed:
        assert (len(speed.samples_tok_s), len(speed.dropped_tok_s)) == (2, 1)
        assert 0 < speed.low_tok_s <= speed.median_tok_s <= speed.high_tok_s
    assert measured.gguf_sha256 == hashing.digest(made.gguf("tiny", "tiny-Q8_0")).sha256
    assert measured.f16_sha256 == hashing.digest(made.f16("tiny")).sha256
    assert (measured.llama_cpp_commit, measured.threads) == (tools.commit, 2)
    quality = measured.quality
    assert isinstance(quality, QualityResult)
    assert (quality.chunks_count, quality.scored_tokens) == (4, 4 * 31)
    assert 0 <= quality.kld_mean_nats < 0.05
    assert quality.kld_mean_nats <= quality.kld_p999_nats <= quality.kld_max_nats
    assert 0.5 < quality.same_top <= 1
    assert quality.ppl_ratio == pytest.approx(1, abs=0.1)
    memory = measured.memory
    assert (memory.context_tokens, memory.method) == (256, "rss")
    assert memory.measured_mib > measured.size_bytes / 2**20
    assert memory.estimate_mib == memory.model_mib + memory.context_mib + memory.compute_mib
    assert measured.machine.backend == tools.backend
    assert measured.validity.steal_share < 1


@pytest.mark.alone
@real
def test_record_and_log_hold_no_path_of_this_machine(
    measured: BenchmarkRecord, made: Layout
) -> None:
    """Tools get names below the checkout, so no output of theirs can carry a home directory."""
    text = measured.model_dump_json()
    outputs = [
        line
        for line in made.log("benchmark", "tiny-Q8_0").read_text().splitlines()
        if not line.startswith("+ ")
    ]

    assert not re.search(r'"/[a-z]', text)
    assert len(outputs) > 50
    assert not [line for line in (text, *outputs) if str(made.root) in line]


@real
def test_divergence_is_the_same_every_time_and_larger_for_fewer_bits(
    at: Layout, tools: Toolchain
) -> None:
    """Quality is arithmetic: a second run gives equal numbers, whatever else this machine does."""
    eight = divergence(bench_of(at, tools, "Q8_0"))
    shutil.rmtree(at.scratch("tiny"))
    again = divergence(bench_of(at, tools, "Q8_0"))
    two = divergence(bench_of(at, tools, "Q2_K"))

    assert again == eight
    assert two.kld_mean_nats > 10 * eight.kld_mean_nats
    assert two.ppl_base == eight.ppl_base


@pytest.mark.alone
@real
def test_speed_is_measured_again_while_others_take_the_cpu(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the machine's condition, never by the number; after three times the last one stands."""
    conditions = iter([True, False, True, True, True])
    monkeypatch.setattr(validity, "was_busy", lambda *_, **__: next(conditions))
    monkeypatch.setattr(benchmark, "PAUSE_BETWEEN_ATTEMPTS_S", 0.0)

    assert benchmark.measure_speed_in_peace(bench_of(at, tools)).attempts == 2
    assert benchmark.measure_speed_in_peace(bench_of(at, tools)).attempts == 3
    assert next(conditions, "none left") == "none left"


@pytest.mark.alone
@real
def test_model_that_ties_its_embeddings_is_measured(tools: Toolchain, tmp_path: Path) -> None:
    """llama.cpp uses one tensor twice and still counts its bytes once, as the record does."""
    at = converted_model(tmp_path / "fleet", tied=True)
    add_quant(at, "Q8_0", tools)
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(WORDS)

    assert len(benchmark.measure_speed(bench_of(at, tools)).results) == 4


@pytest.mark.alone
@real
def test_memory_grows_with_the_declared_context(at: Layout, tools: Toolchain) -> None:
    """The measured run really holds the context: 4,096 tokens of cache take 4 MiB in f16."""
    small, small_peak = benchmark.measure_memory(bench_of(at, tools, context_tokens=256))
    large, large_peak = benchmark.measure_memory(bench_of(at, tools, context_tokens=4_096))

    # 2 layers x 2 heads of 64 x (key + value) x 2 bytes x 4,096 tokens = 4 MiB
    assert large.context_mib - small.context_mib == pytest.approx(4, abs=1)
    assert large_peak.mib - small_peak.mib > 3


# --- logits -----------------------------------------------------------------------------------


@real
def test_logits_are_computed_once_for_a_model(at: Layout, tools: Toolchain) -> None:
    """The second quant reads the file of the first; its size is what was computed before."""
    divergence(bench_of(at, tools, "Q8_0"))
    (first,) = logits(at)
    written = first.stat().st_mtime_ns
    divergence(bench_of(at, tools, "Q2_K"))

    assert [path.stat().st_mtime_ns for path in logits(at)] == [written]
    header = llama_perplexity.BaseHeader(context_tokens=64, vocabulary_tokens=512, chunks=4)
    assert first.stat().st_size == llama_perplexity.base_size_bytes(header)


@real
def test_other_windows_need_other_logits_and_the_old_ones_go(at: Layout, tools: Toolchain) -> None:
    """Several gigabytes each: only the file in use is kept, leftovers of a kill included."""
    divergence(bench_of(at, tools))
    (old,) = logits(at)
    (at.scratch("tiny") / ".logits-dead.kld.part").write_bytes(b"torn")

    divergence(bench_of(at, tools, quality=Quality(context_tokens=64, chunks=5)))

    assert old not in logits(at)
    assert len(list(at.scratch("tiny").iterdir())) == 2


@real
@pytest.mark.parametrize("damage", ["cut", "touched", "no note", "torn note"])
def test_logits_that_anybody_touched_are_computed_again(
    at: Layout, tools: Toolchain, damage: str
) -> None:
    """Scratch may be deleted, cut or overwritten at any moment; the numbers stay right."""
    good = divergence(bench_of(at, tools))
    (path,) = logits(at)
    note = path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "touched":
        path.write_bytes(bytes(path.stat().st_size))
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("{")

    assert divergence(bench_of(at, tools)) == good


@real
def test_logits_that_rotted_are_found_by_their_perplexity_and_removed(
    at: Layout, tools: Toolchain
) -> None:
    """Bytes that changed under an unchanged time stamp do not become a number."""
    good = divergence(bench_of(at, tools))
    (path,) = logits(at)
    stat = path.stat()
    data = bytearray(path.read_bytes())
    row_bytes = 2 * (512 + 4)
    start = 20 + 4 * 64 * 4
    # The scale of half of the rows, their first four bytes: still finite, no longer these logits.
    for row in range(62):
        data[start + row * row_bytes : start + row * row_bytes + 4] = struct.pack("<f", 1e-3)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(ToolError, match="damaged and have been removed"):
        divergence(bench_of(at, tools))

    assert logits(at) == []
    assert divergence(bench_of(at, tools)) == good


@real
def test_disk_too_small_is_said_in_bytes_before_anything_is_written(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of the logits is known from the vocabulary alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(MachineError, match=r"take 129,\d{3} bytes .* 1,000 are free"):
        divergence(bench_of(at, tools))

    assert logits(at) == []


# --- inputs -----------------------------------------------------------------------------------


@real
def test_model_with_other_bytes_is_not_measured(
    at: Layout, tools: Toolchain, tmp_path: Path
) -> None:
    """One flipped bit in the weights loads without complaint, and is refused here."""
    path = at.gguf("tiny", "tiny-Q8_0")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)

    with pytest.raises(DigestError, match="not the file of its record"):
        benchmark.benchmark(slice_of(at), at, tools, lock=tmp_path / "lock")

    assert not at.log("benchmark", "tiny-Q8_0").exists()


@real
def test_reference_with_other_bytes_is_not_measured(at: Layout, tools: Toolchain) -> None:
    """Divergence from another model than the recorded one is no divergence."""
    recorded = file_digest(at.f16("tiny"))
    tiny_llama_gguf(at.f16("tiny"), seed=1)

    with pytest.raises(DigestError, match="not the file of its record"):
        benchmark.measure_quality(bench_of(at, tools), recorded)


@real
def test_absent_model_is_said(at: Layout, tools: Toolchain, tmp_path: Path) -> None:
    """With the next thing to type."""
    at.gguf("tiny", "tiny-Q8_0").unlink()

    with pytest.raises(DigestError, match="does not exist") as caught:
        benchmark.benchmark(slice_of(at), at, tools, lock=tmp_path / "lock")

    assert caught.value.hint == "fleet repro"


@real
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda path: path.unlink(), ParamsError, "does not exist"),
        (lambda path: path.write_text("other"), DigestError, "declared is"),
    ],
)
def test_corpus_that_is_not_the_declared_one(  # noqa: PLR0913, PLR0917 - fixtures
    at: Layout,
    tools: Toolchain,
    tmp_path: Path,
    change: Callable[[Path], object],
    error: type[FleetError],
    words: str,
) -> None:
    """Missing or edited."""
    wanted = slice_of(at)
    change(at.root / "corpora/evaluation.txt")

    with pytest.raises(error, match=words):
        benchmark.benchmark(wanted, at, tools, lock=tmp_path / "lock")


@real
@pytest.mark.parametrize(("words", "windows"), [(20, r"1\d"), (1, "[01]"), (0, "0")])
def test_corpus_too_short_for_the_declared_windows(
    at: Layout, tools: Toolchain, words: int, windows: str
) -> None:
    """llama-perplexity takes what there is, or nothing, and says 0; we say how many fit."""
    (at.root / "corpora/evaluation.txt").write_text(WORDS[:60] * words or "a")

    with pytest.raises(ParamsError, match=rf"fills {windows} windows of 64 tokens .* 4000 are"):
        divergence(bench_of(at, tools, quality=Quality(context_tokens=64, chunks=4000)))

    assert logits(at) == []


@real
def test_too_few_scored_tokens_are_an_error(at: Layout, tools: Toolchain) -> None:
    """Below 100 scored tokens the tool prints a table, no statistics, and exit code 0."""
    with pytest.raises(ToolError, match="fewer than 100"):
        divergence(bench_of(at, tools, quality=Quality(context_tokens=64, chunks=3)))


def test_dropping_every_repetition_is_an_error(tmp_path: Path) -> None:
    """There would be no sample left to take a median of."""
    at = converted_model(tmp_path / "fleet")
    (at.root / "corpora").mkdir()
    (at.root / "corpora/evaluation.txt").write_text(WORDS)
    wanted = slice_of(at, repetitions=3, dropped_repetitions=3)
    record = QuantizeRecord(
        key="tiny-Q8_0",
        model="tiny",
        type="Q8_0",
        f16_sha256="0" * 64,
        llama_cpp_commit="f" * 40,
        recipe=1,
        imatrix_sha256=None,
        imatrix_corpus_sha256=None,
        bits_per_weight=8.5,
        tensors_count=1,
        tensor_types={"Q8_0": 1},
        tensor_bytes={"Q8_0": 34},
        rules=(),
        fallbacks=(),
        gguf=file_digest(at.f16("tiny")),
    )
    records.write(at.quant_record("quantize", "tiny", "Q8_0"), record)

    with pytest.raises(ParamsError, match="leaves none of 3 repetitions"):
        benchmark.benchmark(
            wanted, at, Toolchain(prefix=tmp_path, manifest={}), lock=tmp_path / "lock"
        )


@real
def test_facts_of_another_machine_are_refused(at: Layout, tools: Toolchain, tmp_path: Path) -> None:
    """DVC would enter our numbers under the hardware that the probe saw."""
    at.machine.parent.mkdir(parents=True, exist_ok=True)
    at.machine.write_text(json.dumps({"hw_id": "0" * 64}))

    with pytest.raises(MachineError, match="describes other hardware"):
        benchmark.benchmark(slice_of(at), at, tools, lock=tmp_path / "lock")


# --- tools that misbehave ---------------------------------------------------------------------


PARTS: dict[str, Callable[[Bench], object]] = {
    "llama-bench": benchmark.measure_speed,
    "llama-fit-params": benchmark.measure_memory,
    "llama-perplexity": divergence,
}


@real
@pytest.mark.parametrize(
    ("tool", "body", "words"),
    [
        ("llama-bench", "sys.exit(1)", "ended with exit code 1"),
        ("llama-bench", "os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
        ("llama-bench", "os.abort()", "died of SIGABRT"),
        ("llama-bench", "print('##[set-output name=x]v')", "1 tests instead of 4"),
        ("llama-bench", "print('{}\\n' * 4, end='')", "left out model_filename"),
        ("llama-bench", "pass", "0 tests instead of 4"),
        ("llama-fit-params", "print('Host 1 2')", "no new device"),
        ("llama-fit-params", "pass", "did not end its table"),
        ("llama-perplexity", "pass", "left 0 bytes of logits"),
        ("llama-perplexity", CUT_LOGITS, r"left 129,\d{3} bytes of logits"),
        ("llama-perplexity", NO_STATISTICS, "0 tables and 0 blocks"),
    ],
)
def test_tool_that_fails_or_lies_leaves_nothing_behind(  # noqa: PLR0913, PLR0917 - fixtures
    at: Layout, tools: Toolchain, tmp_path: Path, tool: str, body: str, words: str
) -> None:
    """An error with the log, nothing half-done, and the same part with the real tool goes on."""
    fake = faulty(tmp_path, tools, tool, body)

    with pytest.raises(ToolError, match=words) as caught:
        PARTS[tool](bench_of(at, fake))

    assert caught.value.log == at.log("benchmark", "tiny-Q8_0")
    assert "##[" not in caught.value.message
    assert list(at.scratch("tiny").glob(".*")) == []
    assert PARTS[tool](bench_of(at, tools))


@real
def test_options_of_the_environment_change_nothing(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp reads LLAMA_ARG_*; the tools do not get to see them."""
    good = divergence(bench_of(at, tools))
    monkeypatch.setenv("LLAMA_ARG_LOG_VERBOSITY", "-1")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "8")

    assert divergence(bench_of(at, tools)) == good


# --- one at a time, and stopping ---------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from pipelines import measuring
with measuring.one_at_a_time(Path(sys.argv[1]), "other-Q4_K_M"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_second_benchmark_waits_and_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once would measure one another."""
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        assert holder.stdin is not None
        holder.stdin.write("go on\n")
        holder.stdin.flush()

    monkeypatch.setattr(console, "info", tell)
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, tmp_path],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        with measuring.one_at_a_time(tmp_path, "mine-Q8_0"):
            assert holder.wait(timeout=30) == 0

    assert said == [f"waiting for the measurement of other-Q4_K_M (process {holder.pid})"]


def test_lock_of_a_killed_benchmark_is_free(tmp_path: Path) -> None:
    """The kernel gives it back, however the process ended."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, tmp_path],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        holder.kill()

    with measuring.one_at_a_time(tmp_path, "mine-Q8_0"):
        assert (tmp_path / "benchmark.owner").read_text().startswith("mine-Q8_0")


_PART = """
import json, sys
from pathlib import Path
from pipelines import benchmark
from pipelines.layout import Layout
from pipelines.params import BenchmarkSlice
from pipelines.records import FileDigest
from pipelines.toolchain import Toolchain
part, prefix, manifest, root, size_bytes, wanted, f16 = sys.argv[1:]
slice_ = BenchmarkSlice.model_validate_json(wanted)
tools = Toolchain(prefix=Path(prefix), manifest=json.loads(manifest))
bench = benchmark.Bench(
    wanted=slice_,
    at=Layout(Path(root)),
    tools=tools,
    model_size_bytes=int(size_bytes),
    execution=benchmark.execution(slice_.benchmark, tools.backend, cores=2),
)
if part == "measure_quality":
    benchmark.measure_quality(bench, FileDigest.model_validate_json(f16))
else:
    getattr(benchmark, part)(bench)
"""
_SLEEP = "Path('started').touch(); time.sleep(60)"


@real
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(
    ("part", "tool", "body"),
    [
        ("measure_speed", "llama-bench", _SLEEP),
        ("measure_memory", "llama-bench", _SLEEP),
        (
            "measure_quality",
            "llama-perplexity",
            f"Path(argv[argv.index('--save-all-logits') + 1]).write_bytes(b'_logits_'); {_SLEEP}",
        ),
        ("measure_quality", "llama-perplexity", f"'-f' in argv and sys.exit(run()); {_SLEEP}"),
    ],
    ids=["speed", "memory", "logits", "divergence"],
)
def test_stopped_in_any_part_the_next_run_goes_on(  # noqa: PLR0913, PLR0917 - fixtures
    at: Layout,
    tools: Toolchain,
    tmp_path: Path,
    part: str,
    tool: str,
    body: str,
    how: signal.Signals,
) -> None:
    """No tool survives and no final name is half-written; the next run uses what is whole."""
    if "'-f' in argv" in body:
        divergence(bench_of(at, tools, "Q2_K"))
    fake = faulty(tmp_path, tools, tool, body)
    bench = bench_of(at, fake)
    words = [
        *(part, str(fake.prefix), json.dumps(tools.manifest), str(at.root)),
        *(str(bench.model_size_bytes), bench.wanted.model_dump_json()),
        file_digest(at.f16("tiny")).model_dump_json(),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", _PART, *words], cwd=ROOT, stderr=subprocess.PIPE
    ) as child:
        _wait_until(lambda: (at.root / "started").exists() or child.poll() is not None)
        below = psutil.Process(child.pid).children(recursive=True)
        assert below
        child.send_signal(how)
        child.communicate(timeout=30)

    assert psutil.wait_procs(below, timeout=10)[1] == []
    for path in logits(at):
        assert llama_perplexity.read_base_header(path) is not None
    assert divergence(bench_of(at, tools)).ppl > 1
    assert list(at.scratch("tiny").glob(".*")) == []


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the parts --------------------------------------------------------------------------------


def test_first_repetitions_are_kept_and_do_not_count() -> None:
    """Dropped 10; the median of 20, 40, 30 is 30, between all that are left."""
    result = llama_bench.SpeedResult(
        test=llama_bench.SpeedTest(test="decode", tokens=128, depth_tokens=4096),
        samples_tok_s=(10.0, 20.0, 40.0, 30.0),
        cpu_info="",
        gpu_info="",
        backends="CPU",
    )

    (found,) = benchmark.speed_records([result], dropped=1)

    assert (found.low_tok_s, found.median_tok_s, found.high_tok_s) == (20.0, 30.0, 40.0)
    assert (found.samples_tok_s, found.dropped_tok_s) == ((20.0, 40.0, 30.0), (10.0,))
    assert (found.test, found.tokens, found.depth_tokens) == ("decode", 128, 4096)


def test_threads_and_layers_are_resolved() -> None:
    """Threads default to the cores; a CPU build has no layers to place; batches fit together."""
    declared = Benchmark(batch_tokens=256, ubatch_tokens=512)

    on_cpu = benchmark.execution(declared, "cpu", cores=6)
    on_gpu = benchmark.execution(replace_benchmark(declared, threads=3), "cuda", cores=6)

    assert (on_cpu.threads, on_cpu.gpu_layers, on_cpu.ubatch_tokens) == (6, 0, 256)
    assert (on_gpu.threads, on_gpu.gpu_layers) == (3, 99)
    assert replace(on_gpu, threads=6, gpu_layers=0) == on_cpu


def replace_benchmark(declared: Benchmark, **changes: Any) -> Benchmark:
    """Return a declaration with other values."""
    return Benchmark(**(declared.model_dump() | {"quality": declared.quality} | changes))
