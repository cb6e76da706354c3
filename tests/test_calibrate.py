"""An importance matrix comes from the declared text and says something about every entry."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import psutil
import pytest
import sample
from fake_tools import with_fake
from gguf_factory import converted_model

from pipelines import calibrate as stage
from pipelines import console, gguf_header, hashing, machine
from pipelines.calibrate import calibrate
from pipelines.errors import DigestError, ParamsError, ToolError
from pipelines.params import CalibrateSlice, Corpus

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
CORPUS = "corpora/calibration.txt"
TEXT = sample.of(CORPUS).read_bytes()
pytestmark = pytest.mark.toolchain


def fleet(root: Path, *, text: bytes = TEXT[:20_000]) -> Layout:
    """Make a fleet with one converted model and a calibration text."""
    at = converted_model(root)
    (root / CORPUS).parent.mkdir()
    (root / CORPUS).write_bytes(text)
    return at


def declared(at: Layout, *, chunks: int | None = 4, context_tokens: int = 128) -> CalibrateSlice:
    """Return the slice of the model with the digest of the text as it is now."""
    corpus = Corpus(path=CORPUS, sha256=hashing.digest(at.root / CORPUS).sha256)
    return CalibrateSlice(
        model="tiny", recipe=1, corpus=corpus, context_tokens=context_tokens, chunks=chunks
    )


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of llama.cpp wait for one another by spinning, which stalls a shared machine."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet whose text has some 15,000 tokens."""
    return fleet(tmp_path / "fleet")


# --- what is made -----------------------------------------------------------------------------


def test_the_record_says_what_is_in_the_matrix(at: Layout, tools: Toolchain) -> None:
    """Entries, windows, digests and the names of text and model are those of the file."""
    wanted = declared(at)

    record = calibrate(wanted, at, tools)

    reference = gguf.GGUFReader(at.imatrix("tiny"))
    names = {t.name for t in reference.tensors if t.name.endswith(".in_sum2")}
    assert record.entries_count == len(names) == 14  # 7 matrices in each of 2 blocks
    assert "blk.1.ffn_down.weight.in_sum2" in names
    assert record.chunks_count == reference.fields["imatrix.chunk_count"].contents() == 4
    assert reference.fields["imatrix.chunk_size"].contents() == record.context_tokens == 128
    assert record.imatrix is not None
    assert record.imatrix.sha256 == hashing.digest(at.imatrix("tiny")).sha256
    assert (record.corpus, record.corpus_sha256) == (
        CORPUS,
        hashing.digest(at.root / CORPUS).sha256,
    )
    assert record.f16_sha256 == hashing.digest(at.f16("tiny")).sha256
    assert record.llama_cpp_commit == tools.commit
    assert record.partial_entries_count == 0


def test_two_folders_and_any_number_of_threads_give_the_same_bytes(
    tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrix does not depend on where the fleet lies or on the CPUs, and leaks no path."""
    here, there = fleet(tmp_path / "a/fleet"), fleet(tmp_path / "elsewhere/b/c")

    first = calibrate(declared(here), here, tools)
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    second = calibrate(declared(there), there, tools)

    assert first == second
    data = there.imatrix("tiny").read_bytes()
    assert str(tmp_path).encode() not in data
    assert CORPUS.encode() in data


def test_variables_of_llama_cpp_have_no_effect(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that llama.cpp would read from the environment do not reach it."""
    first = calibrate(declared(at), at, tools)
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "64")
    monkeypatch.setenv("LLAMA_ARG_SWA_FULL", "nonsense")
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")

    assert calibrate(declared(at), at, tools) == first


def test_a_model_that_is_not_the_converted_one_is_refused(at: Layout, tools: Toolchain) -> None:
    """The record passes on the digest of the 16-bit model, so that has to be the file."""
    with at.f16("tiny").open("ab") as file:
        file.write(b"more")

    with pytest.raises(ToolError, match="its record says"):
        calibrate(declared(at), at, tools)

    assert not at.imatrix_dir("tiny").exists()


def test_the_whole_text_is_read_if_no_number_is_declared(tmp_path: Path, tools: Toolchain) -> None:
    """Without `chunks` every full window of the text counts, in odd sizes too."""
    at = fleet(tmp_path / "fleet", text=TEXT[:3_000])

    record = calibrate(declared(at, chunks=None, context_tokens=600), at, tools)

    argv = stage.tokenize_argv(tools.tool("llama-tokenize"), at.f16("tiny"), at.root / CORPUS)
    tokens = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split(",")
    assert record.chunks_count == len(tokens) // 600 > 2


def test_without_calibration_the_folder_is_empty_and_the_record_says_so(
    at: Layout, tools: Toolchain
) -> None:
    """A model without a declared text has no matrix, which is not an error."""
    calibrate(declared(at), at, tools)
    wanted = declared(at).model_copy(update={"corpus": None})

    record = calibrate(wanted, at, tools)

    assert list(at.imatrix_dir("tiny").iterdir()) == []
    assert (record.corpus, record.corpus_sha256, record.imatrix) == (None, None, None)
    assert (record.entries_count, record.chunks_count) == (0, 0)


def test_progress_counts_windows(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window moves the progress line, and the number of all is known from the start."""
    seen: list[tuple[float, float | None]] = []

    def update(progress: console.Progress, done: float, detail: str = "") -> None:
        assert not detail
        seen.append((done, progress.total))

    monkeypatch.setattr(console.Progress, "update", update)

    calibrate(declared(at), at, tools)

    assert seen == [(0, None), (1, 4), (2, 4), (3, 4), (4, 4)]


# --- a text that is not what was declared -----------------------------------------------------


def test_other_bytes_than_declared_are_refused(at: Layout, tools: Toolchain) -> None:
    """A changed text is refused with both digests, before anything runs."""
    wanted = declared(at)
    (at.root / CORPUS).write_bytes(TEXT[:20_001])

    with pytest.raises(DigestError) as caught:
        calibrate(wanted, at, tools)

    assert wanted.corpus is not None
    assert wanted.corpus.sha256 in caught.value.message
    assert hashing.digest(at.root / CORPUS).sha256 in caught.value.message
    assert not at.log("calibrate", "tiny").exists()
    assert_nothing_left(at)


def test_a_missing_text_is_named(at: Layout, tools: Toolchain) -> None:
    """A text that is not there is an error of the declaration."""
    wanted = declared(at)
    (at.root / CORPUS).unlink()

    with pytest.raises(ParamsError, match=r"corpora/calibration\.txt does not exist"):
        calibrate(wanted, at, tools)


@pytest.mark.parametrize(
    ("size_bytes", "chunks", "has", "needs"),
    [(100, None, 0, 2), (100, 4, 0, 4), (400, 999, 2, 999), (2_000, 999, 11, 999)],
)
def test_a_text_that_is_too_short_says_how_much_there_is(  # noqa: PLR0913, PLR0917 - one case each
    tmp_path: Path,
    tools: Toolchain,
    size_bytes: int,
    chunks: int | None,
    has: int,
    needs: int,
) -> None:
    """Fewer windows than declared are an error that says how many the text fills."""
    at = fleet(tmp_path / "fleet", text=TEXT[:size_bytes])

    with pytest.raises(ParamsError) as caught:
        calibrate(declared(at, chunks=chunks), at, tools)

    assert f"fills {has} windows of 128 tokens of tiny, {needs} are needed" in caught.value.message
    assert_nothing_left(at)


# --- a matrix that says nothing ---------------------------------------------------------------

ENTRY = "blk.1.attn_q.weight"
DAMAGES = {
    "zeros": (0.0, "zeros only, or values that are not finite, in " + ENTRY),
    "NaN": (float("nan"), "not finite, in " + ENTRY),
    "infinity": (float("inf"), "not finite, in " + ENTRY),
    "negative": (-1.0, "not finite, in " + ENTRY),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_entry_that_says_nothing_is_named(
    at: Layout, tmp_path: Path, tools: Toolchain, name: str
) -> None:
    """Zeros, NaN, infinities and negative sums of squares are refused with the entry."""
    value, expected = DAMAGES[name]
    fake = rewriting(tmp_path, tools, f"change({ENTRY + '.in_sum2'!r}, float('{value}'))")

    with pytest.raises(ToolError) as caught:
        calibrate(declared(at), at, fake)

    assert expected in caught.value.message
    assert re.search(r"blk.1.attn_q.weight \([\w ,]*\d+", caught.value.message)
    assert_nothing_left(at)


def test_one_value_that_is_not_finite_is_counted(
    at: Layout, tmp_path: Path, tools: Toolchain
) -> None:
    """A single NaN among good sums poisons the types that use them: it is refused and counted."""
    action = f"tensors[{ENTRY + '.in_sum2'!r}].reshape(-1)[3] = float('nan')"

    with pytest.raises(ToolError, match=r"blk.1.attn_q.weight \(1 of \d+ not finite\)"):
        calibrate(declared(at), at, rewriting(tmp_path, tools, action))

    assert_nothing_left(at)


def test_columns_that_are_always_zero_are_recorded_and_warned_of(
    at: Layout, tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that the text never moved is a hole: the matrix is usable, the record says so."""
    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)
    action = f"tensors[{ENTRY + '.in_sum2'!r}].reshape(-1)[:3] = 0"

    record = calibrate(declared(at), at, rewriting(tmp_path, tools, action))

    assert record.zero_columns_count == 3
    assert record.holes[0].startswith(f"{ENTRY} (3 of ")
    assert f"holes: {record.holes[0]}" in warnings[0]
    whole = record.model_copy(update={"holes": (), "zero_columns_count": 0})
    assert {"holes", "zero_columns_count"}.isdisjoint(whole.model_dump())


def test_experts_that_the_text_did_not_reach_are_a_warning(
    at: Layout, tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture of experts of which some saw no token is usable; which, is said and counted."""
    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)
    fake = rewriting(tmp_path, tools, "split('blk.0.ffn_up.weight', 4)")

    record = calibrate(declared(at), at, fake)

    assert record.partial_entries_count == 1
    assert record.entries_count == 14
    assert "blk.0.ffn_up.weight (3 of 4 experts)" in warnings[0]
    assert record.holes == ("blk.0.ffn_up.weight (3 of 4 experts)",)


def test_a_model_that_yields_nan_is_refused_by_the_tool(at: Layout, tools: Toolchain) -> None:
    """A 16-bit model whose activations are not numbers ends the stage with the tool's words."""
    header = gguf_header.read(at.f16("tiny"))
    place = header.data_offset + next(
        t.offset for t in header.tensors if t.name == "blk.0.attn_q.weight"
    )
    data = bytearray(at.f16("tiny").read_bytes())
    data[place : place + 2] = np.float16("nan").tobytes()
    at.f16("tiny").write_bytes(data)

    with pytest.raises(ToolError, match="llama-imatrix ended with exit code 1"):
        calibrate(declared(at), at, tools)
    assert_nothing_left(at)


# --- a tool that misbehaves -------------------------------------------------------------------

FAULTS = {
    "abort": ("os.kill(os.getpid(), signal.SIGABRT)", "died of SIGABRT"),
    "half a file, then killed": (
        "out.write_bytes(b'GGUF' * 99); os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
    "exit 1": ("sys.exit(1)", "exit code 1"),
    "exit 3": ("sys.exit(3)", "exit code 3"),
    "nothing written": ("sys.exit(0)", "exit code 0 and wrote nothing"),
    "garbage printed": ("sys.stdout.buffer.write(os.urandom(99_999))", "wrote nothing"),
    "garbage written": ("out.write_bytes(bytes(range(256)) * 99)", "not a valid GGUF"),
    "truncated": ("run(); data = out.read_bytes(); out.write_bytes(data[:-5000])", "ends at byte"),
    "a model": ("out.write_bytes(Path(argv[1]).read_bytes())", "not a whole importance matrix"),
    "another window": ("run(*argv, '-c', '64', '-b', '64', '-ub', '64')", "another window"),
    "another text": (
        "Path('x.txt').write_bytes(Path(argv[3]).read_bytes()); run(*argv, '-f', 'x.txt')",
        "did not write that it read"),
    "fewer windows": ("run(*argv, '--chunks', '3')", "fills 3 windows"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_tool_that_fails_leaves_nothing(
    at: Layout, tmp_path: Path, tools: Toolchain, name: str
) -> None:
    """Whatever llama-imatrix does, only a proven matrix gets its name, and the next run works."""
    action, expected = FAULTS[name]
    body = f"""
    out = Path(argv[argv.index("-o") + 1])
    {action}
    """
    fake = with_fake(tmp_path / "fake", tools, "llama-imatrix", body)

    with pytest.raises((ToolError, ParamsError)) as caught:
        calibrate(declared(at), at, fake)

    assert expected in caught.value.message
    assert_nothing_left(at)
    assert calibrate(declared(at), at, tools).chunks_count == 4


def test_runner_commands_of_a_tool_are_not_shown(
    at: Layout, tmp_path: Path, tools: Toolchain
) -> None:
    """What a tool prints to command a runner reaches the log only, and the message defused."""
    body = r"""
    sys.stderr.write("##[set-output name=x]y\n::error::boom\n\x1b[2Jbye\n")
    sys.exit(1)
    """
    fake = with_fake(tmp_path / "fake", tools, "llama-imatrix", body)

    with pytest.raises(ToolError) as caught:
        calibrate(declared(at), at, fake)

    assert "set-output" in caught.value.message
    assert not any(hostile in caught.value.message for hostile in ("##[", "::", "\x1b"))
    assert caught.value.log == at.log("calibrate", "tiny")


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from test_calibrate import calibrate, declared, machine
from pipelines.layout import Layout
from pipelines.toolchain import open_prefix
at = Layout(Path({fleet!r}))
machine.usable_cores = lambda: 1
calibrate(declared(at, chunks=None), at, open_prefix(Path({prefix!r})))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_calibration_leaves_no_final_name(
    tmp_path: Path, tools: Toolchain, number: signal.Signals
) -> None:
    """Stopped while the real tool computes: no matrix, no process, and the next run works."""
    at = fleet(tmp_path / "fleet", text=TEXT)
    script = SCRIPT.format(root=str(ROOT), tests=str(Path(__file__).parent), fleet=str(at.root),
                           prefix=str(tools.prefix))  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    log = at.log("calibrate", "tiny")
    wait_for(lambda: log.exists() and b"[2]" in log.read_bytes())
    children = psutil.Process(process.pid).children(recursive=True)

    process.send_signal(number)
    process.wait()

    assert not at.imatrix_dir("tiny").exists()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    assert calibrate(declared(at), at, tools).chunks_count == 4
    assert {p.name for p in at.imatrix_dir("tiny").parent.iterdir()} == {"f16.gguf", "imatrix"}


# --- helpers ----------------------------------------------------------------------------------

REWRITER = """
import gguf
import numpy as np

code = run()
out = Path(argv[argv.index("-o") + 1])
reader = gguf.GGUFReader(out)
tensors = {{tensor.name: np.array(tensor.data) for tensor in reader.tensors}}

def change(name, value):
    tensors[name][:] = value

def split(name, experts):
    sums = tensors[name + ".in_sum2"].reshape(experts, -1)
    counts = np.full((experts, 1), tensors[name + ".counts"].item(), dtype=np.float32)
    sums[-1], counts[-1] = 0, 0
    tensors[name + ".in_sum2"], tensors[name + ".counts"] = sums, counts

{action}
writer = gguf.GGUFWriter(str(out), "x")
writer.kv_data[0].clear()
writer.add_type("imatrix")
writer.add_array("imatrix.datasets", reader.fields["imatrix.datasets"].contents())
for key in ("chunk_count", "chunk_size"):
    writer.add_uint32("imatrix." + key, reader.fields["imatrix." + key].contents())
del reader
for name, data in tensors.items():
    writer.add_tensor(name, data)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
sys.exit(code)
"""


def rewriting(tmp_path: Path, tools: Toolchain, action: str) -> Toolchain:
    """Return a toolchain whose llama-imatrix changes its result with gguf-py."""
    return with_fake(tmp_path / "fake", tools, "llama-imatrix", REWRITER.format(action=action))


def assert_nothing_left(at: Layout) -> None:
    """No matrix, no part of one."""
    assert [path.name for path in at.imatrix_dir("tiny").parent.iterdir()] == ["f16.gguf"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
