"""
Output of llama.cpp is believed only if it is whole and agrees with itself.

`tests/data/llama-*` are the real outputs of the pinned tools on a 3.4 M parameter model: of good
runs, and of runs that went wrong although most of them ended with exit code 0.
"""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fake_tools import with_fake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import llama_bench, llama_fit_params, llama_perplexity, llamacpp, proc
from pipelines.errors import ToolError
from pipelines.llama_bench import BenchExpectation
from pipelines.llama_perplexity import BaseHeader
from pipelines.llamacpp import Execution
from pipelines.toolchain import Toolchain

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.llama_bench import SpeedResult
    from pipelines.llama_fit_params import MemoryEstimate
    from pipelines.llama_perplexity import Divergence

DATA = Path(__file__).parent / "data"
LOG = Path("work/logs/benchmark-tiny.log")
COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"
RUN = Execution(
    threads=2,
    gpu_layers=0,
    flash_attention=True,
    kv_type="f16",
    batch_tokens=512,
    ubatch_tokens=512,
)
EXPECTED = BenchExpectation(
    model="w/Q4_K_M.gguf",
    model_size_bytes=2_112_000,
    commit=COMMIT,
    backend="cpu",
    repetitions=4,
    execution=RUN,
    tests=llama_bench.speed_tests(prompt_tokens=64, generate_tokens=16, depths=(0, 128)),
)
BASE = BaseHeader(context_tokens=128, vocabulary_tokens=1024, chunks=6)

settings.register_profile(
    "parsers",
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("parsers")


def recorded(name: str) -> str:
    """Return a recorded output."""
    return (DATA / f"llama-{name}").read_text()


def bench(text: str, expected: BenchExpectation = EXPECTED) -> tuple[SpeedResult, ...]:
    """Parse the output of llama-bench."""
    return llama_bench.parse_bench(text, expected, LOG)


def divergence(stdout: str, stderr: str | None = None, base: BaseHeader = BASE) -> Divergence:
    """Parse the output of llama-perplexity --kl-divergence."""
    messages = recorded("divergence.stderr") if stderr is None else stderr
    return llama_perplexity.parse_divergence(stdout, messages, base=base, log=LOG)


def estimate(text: str, *, on_gpu: bool = False) -> MemoryEstimate:
    """Parse the output of llama-fit-params."""
    return llama_fit_params.parse_estimate(text, "", on_gpu=on_gpu, log=LOG)


# --- llama-bench ------------------------------------------------------------------------------


def test_bench_samples_are_read_from_the_nanoseconds() -> None:
    """Prefill and decode at both depths, each with all samples in the order they were taken."""
    found = bench(recorded("bench.jsonl"))

    assert [(r.test.test, r.test.tokens, r.test.depth_tokens) for r in found] == [
        ("prefill", 64, 0),
        ("decode", 16, 0),
        ("prefill", 64, 128),
        ("decode", 16, 128),
    ]
    assert found[3].samples_tok_s == pytest.approx(
        [16e9 / ns for ns in (226736122, 185167585, 148974814, 532312019)]
    )
    assert (found[0].cpu_info, found[0].gpu_info, found[0].backends) == ("AMD EPYC", "", "CPU")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_filename", "other.gguf"),
        ("model_size", 2_112_001),
        ("n_prompt", 65),
        ("n_gen", 1),
        ("n_depth", 64),
        ("n_threads", 3),
        ("n_gpu_layers", 99),
        ("flash_attn", -1),
        ("type_k", "q8_0"),
        ("type_v", "f32"),
        ("n_batch", 2048),
        ("n_ubatch", 256),
        ("build_commit", "1c1e57098"),
        ("build_commit", ""),
        ("build_commit", "unknown"),
        ("samples_ns", []),
        ("samples_ns", [1, 2, 3]),
        ("samples_ns", [226736122, 185167585, 148974814, -532312019]),
        ("samples_ns", [226736122, 185167585, 148974814, "532312019"]),
        ("samples_ns", [226736122, 185167585, 148974814, True]),
        ("samples_ns", [226736122, 185167585, 148974814, 10**400]),
        ("samples_ts", [1.0, 2.0, 3.0, 4.0]),
        ("avg_ns", 1),
        ("avg_ts", 1.0),
        ("avg_ts", None),
        ("gpu_info", None),
    ],
)
def test_bench_line_of_another_run_is_refused(field: str, value: object) -> None:
    """Each field that says which run this is, and each number, has to be what was asked."""
    lines = recorded("bench.jsonl").splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {field: value})

    with pytest.raises(ToolError, match="llama-bench"):
        bench("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "line",
    ["[" * 200_000, '{"n_gen": ' + "9" * 5_000 + "}", '{"n_gen": "' + "x" * 100_000],
    ids=["deep", "long number", "long text"],
)
def test_bench_line_that_overstrains_a_parser_is_refused(line: str) -> None:
    """Depth, length and size end in the same short error."""
    with pytest.raises(ToolError, match="no JSON") as caught:
        bench(f"{line}\n" * 4)

    assert len(caught.value.message) < 500


@pytest.mark.parametrize("field", ["n_prompt", "samples_ns", "samples_ts", "avg_ns", "model_size"])
def test_bench_line_without_a_field_is_refused(field: str) -> None:
    """No field has a default."""
    lines = recorded("bench.jsonl").splitlines()
    fields = json.loads(lines[0])
    del fields[field]

    with pytest.raises(ToolError, match=field if field != "samples_ts" else "samples"):
        bench("\n".join([json.dumps(fields), *lines[1:]]) + "\n")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "nan", "1e999"])
def test_bench_number_that_is_no_number_is_refused(text: str) -> None:
    """What JSON does not have is refused, and so is what overflows to an infinity."""
    line = recorded("bench.jsonl").replace('"avg_ts": 73.608272', f'"avg_ts": {text}')

    with pytest.raises(ToolError, match="llama-bench"):
        bench(line)


def test_bench_key_that_is_there_twice_is_refused() -> None:
    """The first of two equal keys must not be forgotten in silence."""
    line = recorded("bench.jsonl").replace('"n_gen": 16,', '"n_gen": 16, "n_gen": 16,')

    with pytest.raises(ToolError, match="twice"):
        bench(line)


def test_bench_cut_off_or_failed_is_refused() -> None:
    """No line, a line less, a line more, a line without its end."""
    text = recorded("bench.jsonl")
    lines = text.splitlines(keepends=True)

    for broken in (
        recorded("bench-failed.jsonl"),
        text[:-1],
        "".join(lines[:-1]),
        text + lines[-1],
        "".join(lines[::-1]),
        "[\n" + text,
    ):
        with pytest.raises(ToolError, match="llama-bench"):
            bench(broken)


def test_bench_that_saw_no_gpu_is_refused_on_a_gpu_build() -> None:
    """A CUDA build without a usable driver runs on the CPU and says nothing about it."""
    expected = BenchExpectation(**(vars(EXPECTED) | {"backend": "cuda"}))

    with pytest.raises(ToolError, match=r"no GPU although llama\.cpp was built for cuda"):
        bench(recorded("bench.jsonl"), expected)


def test_bench_error_names_the_log_and_hides_commands() -> None:
    """A model's own words cannot steer the runner that shows our message."""
    with pytest.raises(ToolError) as caught:
        bench("::set-output name=x::1\n")

    assert caught.value.log == LOG
    assert "::set-output" not in caught.value.message


@given(data=st.data())
def test_bench_with_any_damaged_character_gives_the_same_numbers_or_none(
    data: st.DataObject,
) -> None:
    """Whichever character is replaced, cut or doubled: an error, or what the good run gave."""
    good = bench(recorded("bench.jsonl"))

    damaged = _damage(data, recorded("bench.jsonl"))

    _same_or_refused(lambda: bench(damaged), lambda found: _same_speeds(found, good))


def _same_speeds(found: tuple[SpeedResult, ...], good: tuple[SpeedResult, ...]) -> bool:
    # The last digits of the nanoseconds are beyond what the tool prints twice.
    return all(
        one.samples_tok_s == pytest.approx(other.samples_tok_s, rel=1e-5)
        for one, other in zip(found, good, strict=True)
    )


def test_bench_progress_is_read_from_real_messages() -> None:
    """Each message of `--progress` maps to a share that never falls and ends below one."""
    lines = recorded("bench.stderr").splitlines()

    shares = [share for line in lines if (share := llama_bench.bench_progress(line)) is not None]

    assert len(shares) == len(lines)
    assert 0 <= shares[0] < 0.1
    assert 0.9 < max(shares) < 1
    assert llama_bench.bench_progress("llama-bench: error: failed to load model 'x'") is None


# --- llama-perplexity -------------------------------------------------------------------------


def test_divergence_is_read_from_a_real_run() -> None:
    """The statistics as printed; percentages become shares."""
    found = divergence(recorded("divergence.stdout"))

    assert vars(found) == {
        "ppl": 28.384085,
        "ppl_base": 28.513737,
        "ppl_ratio": 0.995453,
        "ppl_ratio_error": 0.002765,
        "kld_mean_nats": 0.001433,
        "kld_mean_error_nats": 0.000071,
        "kld_p999_nats": 0.013620,
        "kld_max_nats": 0.013966,
        "same_top": pytest.approx(0.96561),
        "same_top_error": pytest.approx(0.00939),
    }


@pytest.mark.parametrize(
    ("run", "cause"),
    [
        ("divergence-missing", "failed to open w/none.kld"),
        ("divergence-cut", "failed reading log-probs for chunk 3"),
        # All statistics are there, finite and in order, of two vocabularies mixed up.
        ("divergence-vocabulary", r"inconsistent vocabulary \(1024 vs 1280\)"),
    ],
)
def test_divergence_of_a_run_that_only_logged_its_failure_is_refused(run: str, cause: str) -> None:
    """llama-perplexity ended with exit code 0 in all three; its error is ours."""
    with pytest.raises(ToolError, match=cause):
        divergence(recorded(f"{run}.stdout"), recorded(f"{run}.stderr"))


def test_divergence_that_lost_its_error_message_is_refused_all_the_same() -> None:
    """The messages can be lost at the tool's exit: what is left of its results is not enough."""
    for run in ("divergence-missing", "divergence-cut"):
        with pytest.raises(ToolError, match="instead of one of each"):
            divergence(recorded(f"{run}.stdout"), "")


@pytest.mark.parametrize("chunks", [1, 5, 7, 600])
def test_divergence_over_another_number_of_windows_is_refused(chunks: int) -> None:
    """`--chunks` is ignored by the tool; the logits say how many rows there must be."""
    base = BaseHeader(context_tokens=128, vocabulary_tokens=1024, chunks=chunks)

    with pytest.raises(ToolError, match=f"6 rows, the logits have {chunks} windows"):
        divergence(recorded("divergence.stdout"), base=base)


def test_divergence_over_other_tokens_is_refused() -> None:
    """The printed error of a share has to follow from the number of scored tokens."""
    base = BaseHeader(context_tokens=512, vocabulary_tokens=1024, chunks=6)

    with pytest.raises(ToolError, match="error of same top"):
        divergence(recorded("divergence.stdout"), base=base)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Mean    KLD:   0.001433", "Mean    KLD:        nan"),
        ("Mean    KLD:   0.001433", "Mean    KLD:       -nan"),
        ("Maximum KLD:   0.013966", "Maximum KLD:        inf"),
        ("Maximum KLD:   0.013966", "Maximum KLD:   0.01396"),
        ("Maximum KLD:   0.013966", "Maximum KLD:  0.013966"),
        ("Maximum KLD:   0.013966", "Maximum KLD:   0,013966"),
        ("99.9%   KLD:   0.013620", "99.9%   KLD:   0.913620"),
        ("Mean    KLD:   0.001433", "Mean    KLD:   0.001533"),
        ("28.384085 ±   3.057630", "27.384085 ±   3.057630"),
        ("0.995453", "0.985453"),
        ("28.513737 ±", " 0.000000 ±"),
        ("28.384085 ±", "-8.384085 ±"),
        ("  -0.004557 ±", "9000.004557 ±"),
        ("Same top p: 96.561", "Same top p: 95.561"),
        ("   0.001433 ±   0.000071", "   0.001433 ±   0.000171"),
        ("====== KL", "===== KL"),
        ("Median  KLD", "Median  KLd"),
    ],
)
def test_divergence_with_a_damaged_number_is_refused(old: str, new: str) -> None:
    """Not finite, a digit less, another separator, or at odds with what is printed elsewhere."""
    text = recorded("divergence.stdout")
    assert text.count(old) == 1

    with pytest.raises(ToolError, match=r"llama-perplexity|percentiles"):
        divergence(text.replace(old, new))


@pytest.mark.parametrize("number", ["   6", " nan", " inf", "9" * 400, "-  6", " 6.5"])
def test_divergence_with_a_row_without_a_number_is_refused(number: str) -> None:
    """The number of a window is a whole one; anything else is an error and no crash."""
    text = recorded("divergence.stdout")
    assert text.count("\n   5  ") == 1

    with pytest.raises(ToolError, match="llama-perplexity"):
        divergence(text.replace("\n   5  ", f"\n{number}  "))


@pytest.mark.parametrize("line", range(2, 48))
def test_divergence_without_any_one_line_is_refused(line: int) -> None:
    """From the head of the table to the last statistic every line is needed, once, in place."""
    lines = recorded("divergence.stdout").split("\n")

    with pytest.raises(ToolError):
        divergence("\n".join(lines[:line] + lines[line + 1 :]))
    with pytest.raises(ToolError):
        divergence("\n".join([*lines[: line + 1], *lines[line:]]))
    with pytest.raises(ToolError):
        divergence("\n".join([*lines[:line], lines[line + 1] + lines[line], *lines[line + 2 :]]))


@given(data=st.data())
def test_divergence_cut_at_any_character_is_refused(data: st.DataObject) -> None:
    """The end of the output gets lost when the tool does not wait for its own printing."""
    whole = recorded("divergence.stdout").rstrip("\n")
    length = data.draw(st.integers(0, len(whole)))

    with pytest.raises(ToolError):
        divergence(whole[:length])


@given(data=st.data())
def test_divergence_with_any_damaged_line_gives_the_same_numbers_or_none(
    data: st.DataObject,
) -> None:
    """Characters that are no digits, put, removed or doubled anywhere in any line."""
    good = divergence(recorded("divergence.stdout"))

    damaged = _damage(data, recorded("divergence.stdout"), alphabet="x -=%±\n\r\t.,eE+|")

    _same_or_refused(lambda: divergence(damaged), lambda found: found == good)


@given(data=st.data())
def test_divergence_never_accepts_what_is_not_finite(data: st.DataObject) -> None:
    """Whichever number of the statistics turns into a NaN or an infinity."""
    start = recorded("divergence.stdout").index("======")
    text = recorded("divergence.stdout")[start:]
    numbers = list(re.finditer(r"-?\d+\.\d{3,6}", text))
    found = data.draw(st.sampled_from(numbers))
    word = data.draw(st.sampled_from(["nan", "-nan", "inf", "-inf"]))
    padded = word.rjust(len(found[0]))

    with pytest.raises(ToolError):
        divergence(
            recorded("divergence.stdout")[:start]
            + text[: found.start()]
            + padded
            + text[found.end() :]
        )


def test_perplexity_of_the_reference_is_found_behind_the_eta() -> None:
    """The estimate stands in one line with "ETA", whose own end goes to the other stream."""
    stderr = recorded("base.stderr")
    assert re.search(r"ETA .*Final estimate", stderr)

    assert llama_perplexity.parse_base_run(stderr, LOG) == 28.5137


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: text.index("Final")],
        lambda text: text[: text.index(" +/-")],
        lambda text: text.replace("28.5137", "nan"),
        lambda text: text + "0.04.811.377 I Final estimate: PPL = 28.5137 +/- 3.07410\n",
        lambda text: text + "0.04.811.377 E Unexpected negative standard deviation of log(prob)\n",
    ],
)
def test_reference_without_one_finite_estimate_is_refused(change: Callable[[str], str]) -> None:
    """Lost, cut, not a number, twice, or in company of an error."""
    with pytest.raises(ToolError, match="llama-perplexity"):
        llama_perplexity.parse_base_run(change(recorded("base.stderr")), LOG)


def test_error_is_seen_behind_an_unfinished_line() -> None:
    """The error of the real run stands behind "ETA", too."""
    line = next(line for line in recorded("divergence-cut.stderr").splitlines() if " E " in line)
    assert not line.split(" E ")[0].endswith("ETA")

    with pytest.raises(ToolError, match="failed reading"):
        llamacpp.refuse_errors("llama-perplexity", line, LOG)


def test_text_that_is_too_short_is_an_error_of_the_real_tool() -> None:
    """The run ended with exit code 0 and left 12 bytes of logits."""
    with pytest.raises(ToolError, match="you need at least 256 tokens"):
        llama_perplexity.parse_base_run(recorded("base-short.stderr"), LOG)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"_logits_" + struct.pack("<i", 128),
        b"_LOGITS_" + struct.pack("<iii", 128, 1024, 6),
        b"_logits_" + struct.pack("<iii", 128, 1024, 0),
        b"_logits_" + struct.pack("<iii", -128, 1024, 6),
    ],
)
def test_file_that_is_no_logits_has_no_header(tmp_path: Path, data: bytes) -> None:
    """Empty, cut off in the header as after a short text, other magic, impossible counts."""
    (tmp_path / "base").write_bytes(data)

    assert llama_perplexity.read_base_header(tmp_path / "base") is None
    assert llama_perplexity.read_base_header(tmp_path / "absent") is None


def test_size_of_logits_by_hand() -> None:
    """20 bytes, then 6 windows of 128 tokens and 63 rows of 1,024 values and two floats."""
    assert llama_perplexity.scored_tokens(128, 6) == 6 * 63
    assert (
        llama_perplexity.base_size_bytes(BASE)
        == 20 + 6 * (4 * 128 + 63 * 2 * (1024 + 4))
        == 780_260
    )
    odd = BaseHeader(context_tokens=4, vocabulary_tokens=5, chunks=1)
    assert llama_perplexity.base_size_bytes(odd) == 20 + 16 + 1 * 2 * (6 + 4)


@pytest.mark.parametrize(
    ("context", "declared", "batch"),
    [(512, 2048, 2048), (512, 2000, 1536), (512, 512, 512), (512, 100, 100), (128, 2048, 2048)],
)
def test_batch_is_whole_windows_or_part_of_one(context: int, declared: int, batch: int) -> None:
    """Anything else ends llama-perplexity with an assertion."""
    assert llama_perplexity.window_batch(context, declared) == batch


def test_progress_of_both_perplexity_runs_is_read_from_real_output() -> None:
    """One line for each window of the reference, one row for each window of the comparison."""
    base = [llama_perplexity.is_base_row(line) for line in recorded("base.stdout").splitlines()]
    rows = [
        windows
        for line in recorded("divergence.stdout").splitlines()
        if (windows := llama_perplexity.divergence_progress(line)) is not None
    ]

    assert sum(base) == 6
    assert rows == [1, 2, 3, 4, 5, 6]


# --- llama-fit-params -------------------------------------------------------------------------


def test_estimate_of_a_cpu_is_the_line_of_the_host() -> None:
    """Weights, cache and working space in MiB."""
    found = estimate(recorded("estimate.stdout"))

    assert (found.model_mib, found.context_mib, found.compute_mib) == (2, 1, 7)
    assert found.total_mib == 10


def test_estimate_of_gpus_is_the_sum_of_their_lines() -> None:
    """What stays in main memory does not count there."""
    text = "CUDA0 4000 500 300 \nCUDA1 3000 400 200 \nHost 280 0 18 \n"

    found = estimate(text, on_gpu=True)

    assert (found.model_mib, found.context_mib, found.compute_mib) == (7000, 900, 500)
    assert estimate(text).total_mib == 298


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Host 2 1 7",
        "Host 2 1 \n",
        "Host 2 1 7 9 \n",
        "Host 2 1 7.5 \n",
        "Host 2 nan 7 \n",
        f"Host {'9' * 5_000} 1 7 \n",
        "Host -2 1 7 \n",
        "Host 0 0 0 \n",
        "Host 2 1 7 \nHost 2 1 7 \n",
        "CUDA0 2 1 7 \n",
        "Host 2 1 7 \nCUDA0 2 1 7 \n",
        "-c 512 -ngl 99\n",
        "##[error]x\nHost 2 1 7 \n",
    ],
)
def test_estimate_in_another_form_is_refused(text: str) -> None:
    """Cut off, extra, not whole numbers, a device twice, no host at the end, or nothing at all."""
    with pytest.raises(ToolError, match="llama-fit-params"):
        estimate(text)


def test_estimate_without_a_gpu_is_refused_where_one_is_used() -> None:
    """A CUDA build that sees no device plans for main memory only."""
    with pytest.raises(ToolError, match="lists no GPU"):
        estimate(recorded("estimate.stdout"), on_gpu=True)


# --- environment ------------------------------------------------------------------------------


def test_tools_see_nothing_that_changes_a_number_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of our environment they have home and devices; what they report would hide the rest."""
    for name in (
        "OMP_THREAD_LIMIT", "OMP_DYNAMIC", "GOMP_CPU_AFFINITY", "LLAMA_ARG_CTX_SIZE", "LD_PRELOAD",
        "GGML_CUDA_FORCE_CUBLAS", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ACTIONS_RUNTIME_TOKEN",
    ):  # fmt: skip
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    nowhere = Toolchain(prefix=Path("prefix"), manifest={})

    found = llamacpp.environment(nowhere)

    assert "canary" not in found.values()
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert found["GGML_NO_BACKTRACE"] == "1"
    assert found["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in llamacpp.environment(nowhere, timed=True)


@pytest.mark.toolchain
@pytest.mark.skipif(sys.platform != "linux", reason="other loaders, other variables")
def test_libraries_of_another_llama_cpp_are_not_loaded(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LD_LIBRARY_PATH comes before the RUNPATH of our programs; ours come before both."""
    for library in (tools.prefix / "lib").glob("lib*.so*"):
        (tmp_path / library.name).write_bytes(b"another one")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    argv: list[str | Path] = [tools.tool("llama-bench"), "--help"]

    with pytest.raises(ToolError):
        proc.run(argv, log=tmp_path / "log")
    proc.run(argv, log=tmp_path / "log", env=llamacpp.environment(tools), inherit_env=False)


# --- the real tools ---------------------------------------------------------------------------


@pytest.mark.toolchain
def test_every_option_is_one_that_the_pinned_tools_know(tools: Toolchain, tmp_path: Path) -> None:
    """Each option on our command lines stands in the help of its tool."""
    lines = {
        "llama-bench": [
            *llama_bench.speed_argv(
                tools,
                "m.gguf",
                prompt_tokens=1,
                generate_tokens=1,
                depths=(0,),
                repetitions=1,
                execution=RUN,
            ),
            *llama_bench.memory_argv(tools, "m.gguf", context_tokens=1, execution=RUN),
        ],
        "llama-perplexity": [
            *llama_perplexity.base_argv(
                tools,
                "m.gguf",
                corpus="c.txt",
                base="b",
                context_tokens=1,
                chunks=1,
                execution=RUN,
                place_by_memory=True,
            ),
            *llama_perplexity.divergence_argv(
                tools, "m.gguf", base="b", context_tokens=1, execution=RUN
            ),
        ],
        "llama-fit-params": llama_fit_params.estimate_argv(
            tools, "m.gguf", context_tokens=1, execution=RUN
        ),
    }
    for name, argv in lines.items():
        done = proc.run([tools.tool(name), "--help"], log=tmp_path / "log")
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", done.stdout + done.stderr))
        start = next(number for number, word in enumerate(argv) if word.endswith(name))
        used = {word for word in argv[start:] if re.fullmatch(r"--?[a-z][a-z-]*", word)}
        used -= {"-I", "-S", "-c"} if name != "llama-perplexity" else {"-I", "-S"}

        assert used - known - ({"-c"} & known) == set(), name


@pytest.mark.toolchain
def test_perplexity_hands_on_its_last_words_and_its_exit_code(
    tools: Toolchain, tmp_path: Path
) -> None:
    """The program runs in a process of ours that waits for its printing, and fails as it does."""
    program = llama_perplexity.perplexity_program(tools)
    assert len(program) > 1

    for _ in range(5):
        done = proc.run(
            [*program, "-m", "absent.gguf", "-c", "64"], log=tmp_path / "log", ok_codes=(1,)
        )

        assert "unable to load model" in done.stderr.splitlines()[-1]


# --- damage -----------------------------------------------------------------------------------


def _damage(data: st.DataObject, text: str, alphabet: str = '0123456789.,-:{}[]" \nxeE') -> str:
    """Replace, remove or double one piece of up to 40 characters."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = min(len(text), start + data.draw(st.integers(0, 40)))
    kind = data.draw(st.sampled_from(["replace", "remove", "double"]))
    middle = {
        "replace": data.draw(st.text(alphabet, min_size=1, max_size=3)),
        "remove": "",
        "double": text[start:end] * 2,
    }[kind]
    return text[:start] + middle + text[end:]


def _same_or_refused(parse: Callable[[], Any], is_same: Callable[[Any], bool]) -> None:
    try:
        found = parse()
    except ToolError:
        return
    assert is_same(found)


def test_a_build_without_repack_is_not_told_to_and_one_with_it_is(tmp_path: Path) -> None:
    """A comparison of engines runs llama-bench of two releases; the older one knows no --repack."""

    def argv(release: str) -> list[str]:
        tools = with_fake(tmp_path, None, "llama-bench", "")
        tools.manifest["llama_cpp_python"] = release
        return llama_bench.memory_argv(tools, "m.gguf", context_tokens=64, execution=RUN)

    assert argv("0.3.36")[-2:] == ["--repack", "1"]
    assert argv("0.4.0")[-2:] == ["--repack", "1"]
    assert "--repack" not in argv("0.3.35")
    assert argv("0.3.36")[:-2] == argv("0.3.35")
