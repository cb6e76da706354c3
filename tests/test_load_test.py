"""The load test of the embedded model by real engines, whole and with planted faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import record_factory as make
import sample
from serving_factory import left_in

from pipelines import convert, declaration, fetch, load_sweep, load_test, params, quantize, records
from pipelines.errors import DigestError, MachineError
from pipelines.layout import Layout
from pipelines.records import ChoiceRecord, HostChoice

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.load_records import LoadTestRecord
    from pipelines.params import LoadTestSlice
    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
TYPES = ("Q8_0", "Q4_K_M")
FEW = {
    "concurrency": (1, 2), "requests": 10, "open_requests": 80, "warm_up_requests": 1,
    "smoke_requests": 2, "degenerate_prompts": 8, "prompt_tokens": 48, "generate_tokens": 16,
}  # fmt: skip
# Levels that this machine keeps however busy it is.
PATIENT = {"ttft_ms": 60_000.0, "tpot_ms": 10_000.0}
FALLBACK = "llama-server stood in for Ollama"


@pytest.fixture(scope="module", name="built")
def _built(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Layout:
    """A checkout in which the embedded model has been fetched, converted and quantized."""
    root = tmp_path_factory.mktemp("load") / "fork"
    sample.take(root, "examples", "corpora", "modelfiles", "params.yaml")
    at = Layout(root)
    declared = declaration.load(at.params)
    fetched = fetch.run(params.fetch_slice(declared, MODEL), at)
    records.write(at.model_record("fetch", MODEL), fetched)
    at.toolchain.write_text(json.dumps(tools.manifest))
    records.write(
        at.model_record("convert", MODEL),
        convert.run(params.convert_slice(declared, MODEL), at),
    )
    records.write(at.model_record("calibrate", MODEL), make.calibrate_record(MODEL))
    for type_ in TYPES:
        made = quantize.run(params.quantize_slice(declared, f"{MODEL}-{type_}"), at)
        records.write(at.quant_record("quantize", MODEL, type_), made)
    return at


@pytest.fixture(name="at")
def _at(built: Layout, tmp_path: Path) -> Layout:
    """A copy of the checkout, to break."""
    return Layout(Path(shutil.copytree(built.root, tmp_path / "fork")))


def wanted(at: Layout, **changes: Any) -> LoadTestSlice:
    """Resolve the declared load test, with few requests and levels that are kept."""
    slice_ = params.load_test_slice(declaration.load(at.params), MODEL)
    slo = params.Slo(**(PATIENT | {"min_goodput": 0.9}))
    few = slice_.load_test.model_copy(update=FEW)
    return slice_.model_copy(
        update={
            "quants": {f"{MODEL}-{type_}": type_ for type_ in TYPES},
            "load_test": few,
            "slos": {"local": slo},
        }
        | changes
    )


def choice(winner: str | None = "Q8_0", **changes: Any) -> ChoiceRecord:
    """Say that one host chose a type, and that both passed."""
    host = HostChoice(
        host="local", limit_mib=4096, margin_mib=1024, incumbent=None, winner=winner,
        runner_up=None, verdict="PROMOTE" if winner else "REJECT", sentence="", binding="",
        candidates=tuple(
            records.Candidate(
                key=f"{MODEL}-{type_}", type=type_, verdict="PASS" if winner else "REJECT",
                on_frontier=True, sentence="",
            )
            for type_ in TYPES
        ),
    )  # fmt: skip
    return ChoiceRecord(
        model=MODEL, objective="speed", context_tokens=512, decode_depth_tokens=256, hw_id="hw",
        gates={}, notes=(), hosts=(host,), **changes,
    )  # fmt: skip


def examined(at: Layout, tools: Toolchain, slice_: LoadTestSlice | None = None) -> LoadTestRecord:
    """Test what was chosen, and see that nothing is left of the servers."""
    record = load_test.load_test(slice_ or wanted(at), choice(), at, tools, lock=at.root / "lock")
    assert left_in(at) == []
    return record


def no_ollama(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Leave this machine neither an Ollama nor a Go, nor what was built by it before."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("pipelines.serving.ollama_install._USUAL_GO", folder / "go")


# --- the whole of it --------------------------------------------------------------------------


def test_the_record_proves_which_bytes_were_served_how_and_how_well(
    built: Layout, tools: Toolchain
) -> None:
    """Digest of the file, manifest that the server listed, context, prompts, runs, levels."""
    record = examined(built, tools)
    (winner,) = record.winners
    (smoke,) = record.smokes
    quantized = records.read(built.quant_record("quantize", MODEL, "Q8_0"), records.QuantizeRecord)

    assert winner.served is not None
    assert winner.served.gguf_sha256 == quantized.gguf.sha256
    assert winner.served.context_tokens == 512
    assert winner.golden is not None
    assert {one.outcome for one in winner.golden.prompts} == {"PASS", "SKIPPED"}
    assert [(run.kind, run.concurrency) for run in winner.runs] == [
        ("closed", 1), ("closed", 2), ("open", None),
    ]  # fmt: skip
    assert winner.runs[-1].requests_count == 80
    assert {gate.name for gate in winner.gates} == {"ttft", "tpot", "goodput", "memory"}
    assert winner.served.peak_memory_mib
    assert winner.calibration is not None
    assert (smoke.type, smoke.outcome, smoke.ok_count) == ("Q4_K_M", "PASS", 2)
    assert record.engine is not None
    if record.engine.kind == "ollama":
        assert re.fullmatch("[0-9a-f]{64}", winner.served.manifest_sha256 or "")
    # On a busy machine the numbers may be INVALID; they are never something else for that.
    (verdict,) = record.verdicts
    assert verdict.verdict in {"PROMOTE", "INVALID", "HOLD"}


def test_without_ollama_and_go_the_toolchains_server_stands_in_and_nothing_is_promoted(
    at: Layout, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said loudly, and what it measured is kept."""
    no_ollama(monkeypatch, tmp_path / "cache")
    record = examined(at, tools)

    assert record.engine is not None
    assert (record.engine.kind, record.engine.declared) == ("llama-server", False)
    assert record.winners[0].runs
    (verdict,) = record.verdicts
    assert verdict.verdict in {"HOLD", "INVALID"}
    assert verdict.verdict == "INVALID" or FALLBACK in verdict.sentence


def test_a_declared_llama_server_is_as_good_as_any(
    at: Layout, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who serves with it declares it, and nothing is held for that."""
    no_ollama(monkeypatch, tmp_path / "cache")
    slice_ = wanted(at)
    serving = slice_.serving.model_copy(update={"engine": "llama-server"})
    record = examined(at, tools, slice_.model_copy(update={"serving": serving}))

    assert record.engine is not None
    assert record.engine.declared
    assert FALLBACK not in record.verdicts[0].sentence


def test_an_ollama_that_is_declared_and_cannot_be_had_is_an_error_with_the_next_step(
    at: Layout, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record is written of what did not run."""
    no_ollama(monkeypatch, tmp_path / "cache")
    slice_ = wanted(at)
    serving = slice_.serving.model_copy(update={"engine": "ollama"})

    with pytest.raises(MachineError) as caught:
        examined(at, tools, slice_.model_copy(update={"serving": serving}))

    assert caught.value.hint


def test_where_nothing_was_chosen_nothing_is_served(built: Layout, tools: Toolchain) -> None:
    """The verdict is that of the choice."""
    record = load_test.load_test(
        wanted(built), choice(None), built, tools, lock=built.root / "lock"
    )

    assert (record.engine, record.winners, record.smokes) == (None, (), ())
    assert record.verdicts[0].verdict == "REJECT"


# --- planted faults ---------------------------------------------------------------------------


def test_a_planted_wrong_template_rejects_with_a_diff(at: Layout, tools: Toolchain) -> None:
    """A TEMPLATE in the Modelfile makes Ollama prompt otherwise than upstream does."""
    path = at.root / "modelfiles/chat.Modelfile.j2"
    path.write_text(
        "# version: 2\n"
        'TEMPLATE """{% raw %}{{ range .Messages }}<|{{ .Role }}|> {{ .Content }}\n'
        '{{ end }}<|assistant|>{% endraw %}"""\n'
    )
    record = examined(at, tools)
    if record.engine is None or record.engine.kind != "ollama":
        pytest.skip("a llama-server alone takes nothing of a Modelfile")
    golden = record.winners[0].golden

    assert golden is not None
    wrong = [one for one in golden.prompts if one.outcome == "FAIL"]
    assert wrong
    assert any(one.diff for one in wrong)
    assert record.verdicts[0].verdict in {"REJECT", "INVALID"}
    if record.verdicts[0].verdict == "REJECT":
        assert "did not pass as a prompt" in record.verdicts[0].sentence


def test_another_gguf_under_the_same_name_is_never_served(at: Layout, tools: Toolchain) -> None:
    """Ollama would serve whatever lies there; both digests are named."""
    other = at.gguf(MODEL, f"{MODEL}-Q4_K_M").read_bytes()
    at.gguf(MODEL, f"{MODEL}-Q8_0").write_bytes(other)
    made = records.read(at.quant_record("quantize", MODEL, "Q8_0"), records.QuantizeRecord)

    with pytest.raises(DigestError) as caught:
        examined(at, tools)

    assert made.gguf.sha256 in caught.value.message
    assert left_in(at) == []


def test_a_gguf_that_cannot_be_loaded_is_rejected_in_the_servers_own_words(
    at: Layout, tools: Toolchain
) -> None:
    """Its record names the very bytes, so it is the file that is broken."""
    gguf = at.gguf(MODEL, f"{MODEL}-Q8_0")
    gguf.write_bytes(gguf.read_bytes()[:-200_000])
    path = at.quant_record("quantize", MODEL, "Q8_0")
    made = records.read(path, records.QuantizeRecord)
    from pipelines import hashing  # noqa: PLC0415 - here alone

    cut = made.gguf.model_copy(
        update={"sha256": hashing.digest(gguf).sha256, "size_bytes": gguf.stat().st_size}
    )
    records.write(path, made.model_copy(update={"gguf": cut}))

    record = examined(at, tools)

    assert record.winners[0].failures
    assert record.verdicts[0].verdict == "REJECT"
    assert record.winners[0].runs == ()


def test_levels_that_are_not_kept_reject_with_the_counts(at: Layout, tools: Toolchain) -> None:
    """A microsecond to the first token is kept by no request."""
    slo = params.Slo(ttft_ms=0.001, min_goodput=0.9)
    record = examined(at, tools, wanted(at, slos={"local": slo}))
    (ttft,) = [gate for gate in record.winners[0].gates if gate.name == "ttft"]

    assert (ttft.outcome, ttft.value) == ("FAIL", 0)
    assert ttft.sentence.startswith("0 of 80 requests had the first token within 0.001 ms")


def test_every_point_of_a_sweep_is_served_and_measured(
    at: Layout, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the card is made up: this engine serves every point from the CPU."""
    records.write(at.model_record("choose", MODEL), choice())
    monkeypatch.setattr(load_sweep, "nothing_to_sweep", lambda *_: "")

    (found,) = load_sweep.run(wanted(at), at)

    assert tools.backend == "cpu"
    assert [point.gpu_layers for point in found.points] == [0, 1, 2, 4, 5]
    assert all(point.output_tok_s for point in found.points)
    assert records.read(at.sweep_record(MODEL, found.type), type(found)) == found


# --- being stopped ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("phase", ["starting", "serving", "load:"])
def test_stopped_in_any_phase_nothing_is_left_and_no_record_is_written(
    at: Layout, tools: Toolchain, number: signal.Signals, phase: str
) -> None:
    """No server, no llama-server, no generator, no file; also after a kill -9."""
    assert tools.tool("llama-server").exists()
    records.write(at.model_record("choose", MODEL), choice())
    progress = at.root / "progress.jsonl"
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines", "load-test", MODEL],
        cwd=at.root,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GGUF_FLEET_PROGRESS": str(progress)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        _wait_for(_phases(at, progress)[phase])
        below = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(number)
        running.communicate(timeout=30)

    _, alive = psutil.wait_procs(below, timeout=10)
    assert alive == []
    assert left_in(at) == []
    assert not at.model_record("load-test", MODEL).exists()


def _phases(at: Layout, progress: Path) -> dict[str, Callable[[], bool]]:
    def serving() -> bool:
        return any(
            process.info["name"] == "llama-server"
            and str(at.root) in " ".join(process.info["cmdline"] or [])
            for process in psutil.process_iter(["name", "cmdline"])
        )

    return {
        "starting": lambda: at.serving.exists() and any(at.serving.iterdir()),
        "serving": serving,
        "load:": lambda: progress.exists() and "load:" in progress.read_text(),
    }


def _wait_for(condition: Callable[[], bool], within_s: float = 120) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
