"""A quant is exactly what was declared and predicted, or it is not there."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import psutil
import pytest
import sample
from fake_tools import with_fake
from gguf_factory import converted_model, quant

from pipelines import console, gguf_header, hashing, machine, records
from pipelines.calibrate import calibrate
from pipelines.errors import DigestError, MachineError, ParamsError, ToolError
from pipelines.params import CalibrateSlice, Corpus
from pipelines.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.toolchain


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A fleet with one converted model of 2 blocks, whose rows all have 256 elements or more."""
    return converted_model(tmp_path / "fleet")


# --- what is made -----------------------------------------------------------------------------


def test_the_record_says_what_is_in_the_file(at: Layout, tools: Toolchain) -> None:
    """Types, bytes, bits per weight and digests of the record are those of the file."""
    record = quantize(quant(), at, tools)

    path = at.gguf("tiny", "tiny-Q4_K_M")
    reference = gguf.GGUFReader(path)
    types = [tensor.tensor_type.name for tensor in reference.tensors]
    assert record.tensor_types == {name: types.count(name) for name in types} == {
        "Q4_K": 13, "F32": 5, "Q6_K": 3,
    }  # fmt: skip
    assert sum(record.tensor_bytes.values()) == sum(t.n_bytes for t in reference.tensors)
    weights = sum(tensor.n_elements for tensor in reference.tensors)
    assert record.bits_per_weight == pytest.approx(
        8 * sum(record.tensor_bytes.values()) / weights, abs=1e-4
    )
    digests = hashing.digest(path)
    assert (record.gguf.sha256, record.gguf.md5) == (digests.sha256, digests.md5)
    assert record.gguf.name == "tiny-Q4_K_M.gguf"
    assert record.llama_cpp_commit == tools.commit
    assert (record.imatrix_sha256, record.rules, record.fallbacks) == (None, (), ())


@pytest.mark.parametrize("type_", ["F32", "BF16", "Q8_0", "Q5_1", "Q3_K_S", "Q2_K"])
def test_every_kind_of_type_is_made_as_predicted(at: Layout, tools: Toolchain, type_: str) -> None:
    """Unquantized, legacy, K and I types end as the file that their dry run announced."""
    record = quantize(quant(type_), at, tools)

    assert at.gguf("tiny", f"tiny-{type_}").stat().st_size == record.gguf.size_bytes
    assert type_.removesuffix("_S") in record.tensor_types


def test_two_runs_and_two_folders_give_the_same_bytes(tmp_path: Path, tools: Toolchain) -> None:
    """The same model in another folder, and once more in the same, gives the same sha256."""
    here, there = (converted_model(tmp_path / name / "fleet") for name in ("a", "elsewhere/b"))

    made = [quantize(quant("Q5_K_S"), at, tools) for at in (here, there, here)]

    assert made[0] == made[1] == made[2]


def test_bytes_do_not_depend_on_the_number_of_threads(
    at: Layout, tmp_path: Path, tools: Toolchain
) -> None:
    """One thread and two make the file that the stage makes."""
    record = quantize(quant(), at, tools)
    program = tools.tool("llama-quantize")

    for threads in ("1", "2"):
        out = tmp_path / f"{threads}.gguf"
        argv: list[str | Path] = [program, at.f16("tiny"), out, "Q4_K_M", threads]
        subprocess.run(argv, check=True, capture_output=True)
        assert hashing.digest(out).sha256 == record.gguf.sha256


def test_metadata_follows_the_conventions(calibrated: Layout, tools: Toolchain) -> None:
    """File type, quantization version and the importance matrix are in the file, no path is."""
    quantize(quant(imatrix=True), calibrated, tools)

    path = calibrated.gguf("tiny", "tiny-Q4_K_M")
    header = gguf_header.read(path)
    assert header.integer("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert header.integer("general.quantization_version") == gguf.GGML_QUANT_VERSION
    assert header.text("quantize.imatrix.file") == "imatrix.gguf"
    assert header.text("quantize.imatrix.dataset") == "corpora/calibration.txt"
    assert header.integer("quantize.imatrix.entries_count") == 14
    assert header.integer("quantize.imatrix.chunks_count") == 4
    assert str(calibrated.root).encode() not in path.read_bytes()


# --- importance matrix ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated_once(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Layout:
    """A fleet with a converted and calibrated model."""
    at = converted_model(tmp_path_factory.mktemp("calibrated") / "fleet")
    text = at.root / "corpora/calibration.txt"
    text.parent.mkdir()
    text.write_bytes(sample.of("corpora/calibration.txt").read_bytes()[:20_000])
    corpus = Corpus(path="corpora/calibration.txt", sha256=hashing.digest(text).sha256)
    wanted = CalibrateSlice(model="tiny", recipe=1, corpus=corpus, context_tokens=128, chunks=4)
    with pytest.MonkeyPatch.context() as patch:
        # Threads of llama.cpp wait for one another by spinning, which stalls a shared machine.
        patch.setattr(machine, "usable_cores", lambda: 1)
        records.write(at.model_record("calibrate", "tiny"), calibrate(wanted, at, tools))
    return at


@pytest.fixture
def calibrated(calibrated_once: Layout, tmp_path: Path) -> Layout:
    """A copy of that fleet."""
    shutil.copytree(calibrated_once.root, tmp_path / "calibrated")
    return replace(calibrated_once, root=tmp_path / "calibrated")


def test_the_imatrix_changes_the_file_and_is_in_the_record(
    calibrated: Layout, tools: Toolchain
) -> None:
    """With the importance matrix other bytes come out, and the record names matrix and corpus."""
    without = quantize(quant(), calibrated, tools)
    record = quantize(quant(imatrix=True), calibrated, tools)

    calibration = records.read(
        calibrated.model_record("calibrate", "tiny"), records.CalibrateRecord
    )
    assert record.gguf.sha256 != without.gguf.sha256
    assert calibration.imatrix is not None
    assert record.imatrix_sha256 == calibration.imatrix.sha256
    assert record.imatrix_corpus_sha256 == calibration.corpus_sha256


def test_types_that_need_an_imatrix_are_refused_without(at: Layout, tools: Toolchain) -> None:
    """A rule with a type of two bits is refused before the run; the hint names both settings."""
    with pytest.raises(ParamsError, match="garbage without an importance matrix") as caught:
        quantize(quant("Q4_K_M", (("attn_q", "iq2_xxs"),)), at, tools)

    assert "imatrix: true" in caught.value.hint
    assert not at.gguf("tiny", "tiny-Q4_K_M").exists()


def test_types_that_need_an_imatrix_work_with_it(calibrated: Layout, tools: Toolchain) -> None:
    """A type of two bits is made with the importance matrix."""
    wanted = quant("Q2_K_S", imatrix=True)

    record = quantize(wanted, calibrated, tools)

    with pytest.raises(ParamsError, match="garbage without"):
        quantize(wanted.model_copy(update={"imatrix": False}), calibrated, tools)
    assert record.tensor_types["Q2_K"] > 0


def test_an_imatrix_of_another_model_is_refused(calibrated: Layout, tools: Toolchain) -> None:
    """A matrix whose record names another 16-bit file is stale."""
    path = calibrated.model_record("calibrate", "tiny")
    record = records.read(path, records.CalibrateRecord)
    records.write(path, record.model_copy(update={"f16_sha256": "0" * 64}))

    with pytest.raises(ToolError, match="not the importance matrix of the present"):
        quantize(quant(imatrix=True), calibrated, tools)


def test_an_imatrix_with_one_bit_changed_is_refused(calibrated: Layout, tools: Toolchain) -> None:
    """It loads and quantizes without complaint, so its digest decides."""
    path = calibrated.imatrix("tiny")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)

    with pytest.raises(ToolError, match="not the importance matrix of the present"):
        quantize(quant(imatrix=True), calibrated, tools)


def test_an_imatrix_that_was_never_declared_is_asked_for(at: Layout, tools: Toolchain) -> None:
    """`imatrix: true` on a model without calibration says what to declare."""
    wanted = CalibrateSlice(model="tiny", recipe=1, corpus=None, context_tokens=512, chunks=None)
    records.write(at.model_record("calibrate", "tiny"), calibrate(wanted, at, tools))

    with pytest.raises(ParamsError, match=r"models\.tiny has none"):
        quantize(quant(imatrix=True), at, tools)


# --- declarations that do not fit the model ---------------------------------------------------


def test_rules_decide_in_their_order(at: Layout, tools: Toolchain) -> None:
    """The first rule that is found wins, and the record counts the tensors of each."""
    rules = ((r"blk\.0\.attn_q", "q8_0"), ("attn_q", "q6_k"), ("ffn_", "q3_k"))

    record = quantize(quant("Q4_K_M", rules), at, tools)

    assert [rule.tensors_count for rule in record.rules] == [1, 1, 6]
    types = {t.name: t.type for t in gguf_header.read(at.gguf("tiny", "tiny-Q4_K_M")).tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.1.attn_q.weight"] == "Q6_K"
    assert types["blk.1.ffn_down.weight"] == "Q3_K"


@pytest.mark.parametrize(
    "rules",
    [
        (("attn_qq", "q8_0"),),
        ((r"\d\.attn_q$", "q8_0"),),
        (("attn", "q8_0"), ("attn_q", "q6_k")),
        (("_norm", "q8_0"),),
    ],
    ids=["misspelt", "anchored", "behind a wider one", "norms"],
)
def test_a_rule_without_effect_is_an_error(
    at: Layout, tools: Toolchain, rules: tuple[tuple[str, str], ...]
) -> None:
    """A rule that decides no tensor is named, with names that there are."""
    with pytest.raises(ParamsError) as caught:
        quantize(quant(rules=rules), at, tools)

    assert f"{rules[-1][0]} -> {rules[-1][1]} decides no tensor" in caught.value.message
    assert "blk.0.attn_q.weight" in caught.value.message
    assert not at.gguf("tiny", "tiny-Q4_K_M").exists()


def test_fallbacks_are_an_error_unless_allowed(tmp_path: Path, tools: Toolchain) -> None:
    """Rows of 896 cannot be Q4_K: the error names tensors, types and what to declare."""
    at = converted_model(tmp_path, n_ff=896)

    with pytest.raises(ParamsError) as caught:
        quantize(quant(), at, tools)
    record = quantize(quant(max_fallbacks=2), at, tools)

    assert "blk.0.ffn_down.weight: Q5_0 instead of Q4_K" in caught.value.message
    assert "max_fallbacks: 2" in caught.value.hint
    assert [(f.tensor, f.wanted, f.got) for f in record.fallbacks] == [
        ("blk.0.ffn_down.weight", "Q4_K", "Q5_0"),
        ("blk.1.ffn_down.weight", "Q6_K", "Q8_0"),
    ]
    assert record.tensor_types["Q5_0"] == 1


def test_a_forced_type_that_rows_do_not_fit_is_refused(tmp_path: Path, tools: Toolchain) -> None:
    """llama-quantize would abort in the middle; the stage says it before the start."""
    at = converted_model(tmp_path, n_embd=96, n_head=2, n_head_kv=1)

    with pytest.raises(ParamsError, match="output_tensor_type: q4_k stores blocks of 256"):
        quantize(quant("Q8_0", output_tensor_type="q4_k"), at, tools)
    with pytest.raises(ParamsError, match="token_embedding_type: q6_k stores blocks of 256"):
        quantize(quant("Q8_0", token_embedding_type="q6_k"), at, tools)


def test_types_of_output_and_embeddings_are_forced(at: Layout, tools: Toolchain) -> None:
    """Both options reach the file."""
    wanted = quant(output_tensor_type="q8_0", token_embedding_type="q5_k", pure=True)

    quantize(wanted, at, tools)

    types = {t.name: t.type for t in gguf_header.read(at.gguf("tiny", wanted.key)).tensors}
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q8_0", "Q5_K")
    assert types["blk.1.ffn_down.weight"] == "Q4_K"  # not Q6_K: `pure`


def test_an_option_without_effect_is_an_error(at: Layout, tmp_path: Path, tools: Toolchain) -> None:
    """What llama-quantize would silently ignore is refused."""
    tied = converted_model(tmp_path / "tied", tied=True)

    with pytest.raises(ParamsError, match="another option of this quant decides it"):
        quantize(quant(output_tensor_type="q8_0", leave_output_tensor=True), at, tools)
    with pytest.raises(ParamsError, match="has no output tensor"):
        quantize(quant(leave_output_tensor=True), tied, tools)
    with pytest.raises(ParamsError, match="tiny has no experts"):
        quantize(quant("MXFP4_MOE"), at, tools)
    kept = quantize(quant(leave_output_tensor=True), at, tools)
    assert kept.tensor_types["F16"] == 1


def test_a_quantized_source_is_refused(at: Layout, tools: Toolchain) -> None:
    """Quantizing a quant loses quality that no gate would attribute to it."""
    quantize(quant("Q8_0"), at, tools)
    put_source(at, at.gguf("tiny", "tiny-Q8_0").read_bytes())

    with pytest.raises(ToolError, match="holds tensors of Q8_0: quantizing twice"):
        quantize(quant(), at, tools)


def test_a_source_that_is_not_the_converted_one_is_refused(at: Layout, tools: Toolchain) -> None:
    """A 16-bit file that lost its padding no longer matches its record."""
    path = at.f16("tiny")
    path.write_bytes(path.read_bytes() + b"\0")

    with pytest.raises(ToolError, match="its record says"):
        quantize(quant(), at, tools)


def test_a_source_of_the_same_size_with_other_bytes_is_refused(
    at: Layout, tools: Toolchain
) -> None:
    """One weight that another program changed is no model of ours, whatever its size."""
    path = at.f16("tiny")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)

    with pytest.raises(DigestError, match=r"f16\.gguf is .*, its record says"):
        quantize(quant(), at, tools)
    assert_nothing_left(at)


def test_a_full_disk_is_noticed_before_the_first_byte(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less room than the quant needs, nothing is started."""
    usage = shutil.disk_usage(at.root)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(MachineError, match="the disk is too small: quantize tiny-Q4_K_M"):
        quantize(quant(), at, tools)
    assert not at.gguf("tiny", "tiny-Q4_K_M").parent.exists()


def test_a_nan_in_the_model_stops_the_quant(at: Layout, tools: Toolchain) -> None:
    """A weight that is not a number ends the stage with the tool's own words, and no file."""
    header = gguf_header.read(at.f16("tiny"))
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(at.f16("tiny").read_bytes())
    place = header.data_offset + tensor.offset
    data[place : place + 2] = np.float16("nan").tobytes()
    put_source(at, bytes(data))

    with pytest.raises(ToolError, match="llama-quantize ended with exit code 1"):
        quantize(quant(), at, tools)
    assert_nothing_left(at)


# --- a tool that misbehaves -------------------------------------------------------------------

FAULTS = {
    "abort": ("os.kill(os.getpid(), signal.SIGABRT)", "died of SIGABRT"),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
    "half a file, then killed": (
        "out.write_bytes(b'GGUF' * 999); os.kill(os.getpid(), signal.SIGKILL)", "was killed"),
    "exit 3": ("sys.exit(3)", "exit code 3"),
    "nothing written": ("sys.exit(0)", "exit code 0 and wrote nothing"),
    "garbage printed": ("sys.stdout.buffer.write(os.urandom(99_999))", "wrote nothing"),
    "garbage written": ("out.write_bytes(bytes(range(256)) * 99)", "not a valid GGUF"),
    "a directory": ("out.mkdir()", "wrote nothing"),
    "truncated": ("run(); data = out.read_bytes(); out.write_bytes(data[:-5000])", "ends at byte"),
    "header only": ("run(); out.write_bytes(out.read_bytes()[:5000])", "left in the file"),
    "bytes appended": ("run(); out.write_bytes(out.read_bytes() + b'x' * 32)", "its own header"),
    "another tokenizer": (
        ("run(); data = out.read_bytes(); at = data.index(b'tokenizer.ggml.eos_token_id') + 31;"
         "out.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:])"),
        "llama-quantize changed tokenizer.ggml.eos_token_id"),
    "another type": ("run(*argv[:-1], 'Q8_0')", "blk.0.attn_k.weight: predicted Q4_K, found Q8_0"),
    "another model": ("run(argv[0].replace('/fleet/', '/other/'), *argv[1:])", "no such tensor"),
    "an imatrix of its own": (
        "run('--imatrix', argv[0].replace('f16.', 'imatrix/imatrix.'), *argv)", "made with the"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_tool_that_fails_leaves_nothing(
    calibrated_once: Layout, tmp_path: Path, tools: Toolchain, name: str
) -> None:
    """Whatever llama-quantize does, only a proven file gets its name, and the next run works."""
    shutil.copytree(calibrated_once.root, tmp_path / "fleet")
    at = replace(calibrated_once, root=tmp_path / "fleet")
    converted_model(tmp_path / "other", n_layer=1)
    action, expected = FAULTS[name]
    body = f"""
    if "--dry-run" in argv:
        sys.exit(run())
    out = Path(argv[-2])
    {action}
    """
    fake = with_fake(tmp_path / "fake", tools, "llama-quantize", body)

    with pytest.raises(ToolError) as caught:
        quantize(quant(), at, fake)

    assert expected in caught.value.message
    assert_nothing_left(at)
    assert quantize(quant(), at, tools).tensors_count == 21


def test_a_plan_that_contradicts_the_model_is_not_believed(
    at: Layout, tmp_path: Path, tools: Toolchain
) -> None:
    """A dry run that says nothing useful ends the stage before anything is written."""
    fake = with_fake(tmp_path / "fake", tools, "llama-quantize", "print('all is well')")

    with pytest.raises(ToolError, match="cannot be trusted: it does not name token_embd"):
        quantize(quant(), at, fake)

    assert_nothing_left(at)


def test_runner_commands_of_a_tool_are_not_shown(
    at: Layout, tmp_path: Path, tools: Toolchain
) -> None:
    """What a tool prints to command a runner reaches the log only, and the message defused."""
    body = r"""
    sys.stderr.write("##[set-output name=x]y\n::error::boom\n\x1b[2Jbye\n")
    sys.exit(3)
    """
    fake = with_fake(tmp_path / "fake", tools, "llama-quantize", body)

    with pytest.raises(ToolError) as caught:
        quantize(quant(), at, fake)

    message = caught.value.message
    assert "set-output" in message
    assert not any(hostile in message for hostile in ("##[", "::", "\x1b"))
    assert "##[set-output name=x]y" in at.log("quantize", "tiny-Q4_K_M").read_text()


def test_tensors_that_the_imatrix_does_not_know_are_named(
    calibrated: Layout, tmp_path: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors quantized without the importance matrix are a warning; the embeddings are not."""
    warnings: list[str] = []
    monkeypatch.setattr(console, "warn", warnings.append)
    body = """
    sys.stderr.write("\\n====== x: did not find weights for blk.0.attn_q.weight\\n")
    sys.exit(run())
    """
    fake = with_fake(tmp_path / "fake", tools, "llama-quantize", body)

    quantize(quant(imatrix=True), calibrated, fake)

    assert len(warnings) == 1
    assert "has nothing about blk.0.attn_q.weight; they" in warnings[0]


# --- being stopped ----------------------------------------------------------------------------

STAGE = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from gguf_factory import quant
from pipelines.layout import Layout
from pipelines.quantize import quantize
from pipelines.toolchain import open_prefix
quantize(quant("IQ3_S"), Layout(Path({fleet!r})), open_prefix(Path({prefix!r})))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_a_stopped_quant_leaves_no_final_name(
    tmp_path: Path, tools: Toolchain, number: signal.Signals
) -> None:
    """Stopped while the real tool writes: no file under the final name, and the next run works."""
    at = converted_model(tmp_path / "fleet", n_embd=512, n_ff=1024, n_layer=4)
    final = at.gguf("tiny", "tiny-IQ3_S")
    script = STAGE.format(root=str(ROOT), tests=str(Path(__file__).parent), fleet=str(at.root),
                          prefix=str(tools.prefix))  # fmt: skip
    stage = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    part = final.with_name(f".{final.name}.part")
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    children = psutil.Process(stage.pid).children(recursive=True)

    stage.send_signal(number)
    stage.wait()

    assert not final.exists()
    assert part.exists() == (number == signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
    record = quantize(quant("Q8_0", key="tiny-IQ3_S"), at, tools)  # the same file, sooner
    assert final.stat().st_size == record.gguf.size_bytes
    assert_only(final)


# --- helpers ----------------------------------------------------------------------------------


def put_source(at: Layout, data: bytes) -> None:
    """Replace the 16-bit GGUF, and what its record says of the file."""
    at.f16("tiny").write_bytes(data)
    path = at.model_record("convert", "tiny")
    record = records.read(path, records.ConvertRecord)
    digests = hashing.digest(at.f16("tiny"))
    file = record.gguf.model_copy(update={"size_bytes": len(data), "sha256": digests.sha256})
    records.write(path, record.model_copy(update={"gguf": file}))


def assert_nothing_left(at: Layout) -> None:
    """No quant, no part of one."""
    folder = at.gguf("tiny", "x").parent
    assert not folder.exists() or list(folder.iterdir()) == []


def assert_only(path: Path) -> None:
    """The file is alone in its folder."""
    assert list(path.parent.iterdir()) == [path]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
