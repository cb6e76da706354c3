"""Track, against real MLflow stores: a sqlite file, a server, and servers that misbehave."""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import pytest
import yaml
from record_factory import load_run, load_test_record, served, winner_test

from pipelines import records, track
from pipelines.errors import DigestError, StoreError
from pipelines.layout import Layout
from pipelines.params import Track, TrackSlice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.load_records import LoadTestRecord
    from pipelines.params import QuantType

ROOT = Path(__file__).resolve().parent.parent
QUANTS: dict[str, QuantType] = {"tiny-Q8_0": "Q8_0", "tiny-Q4_0": "Q4_0"}
SPEED = {"prefill": 100.0, "decode": 50.0}


def slice_of(uri: str = "sqlite:///work/mlflow.db") -> TrackSlice:
    """What track reads of a model with two quants."""
    return TrackSlice(model="tiny", quants=QUANTS, track=Track(tracking_uri=uri))


def write_records(at: Layout, *, chosen: str = "Q4_0", decode_tok_s: float = 50.0) -> None:
    """Write the records that the stages before track leave."""
    digest = {key: ("8" if type_ == "Q8_0" else "4") * 64 for key, type_ in QUANTS.items()}
    records.write(
        at.model_record("fetch", "tiny"),
        records.FetchRecord(
            model="tiny", source="hf:owner/tiny", revision="a" * 40, architecture="Llama",
            license="apache-2.0", parameters_count=10, dtypes={"BF16": 10}, size_bytes=20, files=(),
        ),
    )  # fmt: skip
    for key, type_ in QUANTS.items():
        records.write(
            at.quant_record("quantize", "tiny", type_),
            records.QuantizeRecord(
                key=key, model="tiny", type=type_, f16_sha256="f" * 64, llama_cpp_commit="c" * 40,
                recipe=1, imatrix_sha256=None, imatrix_corpus_sha256=None, bits_per_weight=4.5,
                tensors_count=3, tensor_types={type_: 3}, tensor_bytes={type_: 30}, rules=(),
                fallbacks=(),
                gguf=records.FileDigest(
                    name=f"{key}.gguf", size_bytes=2**20, sha256=digest[key], md5="0" * 32
                ),
            ),
        )  # fmt: skip
        records.write(
            at.quant_record("benchmark", "tiny", type_),
            benchmark_record(key, type_, digest[key], decode_tok_s),
        )
    records.write(at.model_record("choose", "tiny"), choice_record(chosen))


def benchmark_record(
    key: str, type_: str, digest: str, decode_tok_s: float
) -> records.BenchmarkRecord:
    """A measurement at two depths."""
    speeds = [
        records.Speed(
            test="decode", depth_tokens=depth, tokens=128, median_tok_s=decode_tok_s - depth / 256,
            low_tok_s=decode_tok_s - 2, high_tok_s=decode_tok_s + 2, samples_tok_s=(),
            dropped_tok_s=(),
        )
        for depth in (0, 256)
    ]  # fmt: skip
    return records.BenchmarkRecord(
        key=key, model="tiny", type=type_, gguf_sha256=digest, f16_sha256="f" * 64,
        size_bytes=2**20, llama_cpp_commit="c" * 40,
        machine=records.MachineId(
            hw_id="hw1", env_id="env1", backend="cpu", cpu="A CPU", cores_count=2, memory_gib=8,
            gpus=(),
        ),
        validity=records.Validity(
            verdict="VALID", reasons=(), notes=(), load_before=0, load_after=0, steal_share=0,
            gpu_info="",
        ),
        threads=2, speed=tuple(speeds),
        quality=records.QualityResult(
            corpus_sha256="e" * 64, context_tokens=512, chunks_count=8, scored_tokens=2048,
            kld_mean_nats=0.03, kld_mean_error_nats=0.001, kld_p999_nats=0.5, kld_max_nats=2.0,
            same_top=0.93, same_top_error=0.01, ppl=10.2, ppl_f16=10.0, ppl_ratio=1.02,
            ppl_ratio_error=0.01,
        ),
        memory=records.Memory(
            context_tokens=512, estimate_mib=11, measured_mib=12.5, method="rss", model_mib=9,
            context_mib=1, compute_mib=1,
        ),
        measured_at="2026-11-21T08:00:00+00:00", wall_s=30,
    )  # fmt: skip


def choice_record(chosen: str) -> records.ChoiceRecord:
    """A choice for one host."""
    candidates = tuple(
        records.Candidate(
            key=key, type=type_, gguf_sha256=None, size_mib=1, memory_mib=12.5, decode_tok_s=49,
            prefill_tok_s=100, kld_mean_nats=0.03, kld_p999_nats=0.5, same_top=0.93, ppl_ratio=1.02,
            bits_per_weight=4.5, verdict="CHOSEN" if type_ == chosen else "PASS", on_frontier=True,
            sentence=f"{type_}: a sentence",
        )
        for key, type_ in QUANTS.items()
    )  # fmt: skip
    host = records.HostChoice(
        host="here", limit_mib=None, margin_mib=1024, incumbent=None, winner=chosen, runner_up=None,
        verdict="PROMOTE", sentence="", binding="", candidates=candidates,
    )  # fmt: skip
    return records.ChoiceRecord(
        model="tiny", objective="speed", context_tokens=512, decode_depth_tokens=256, hw_id="hw1",
        gates={}, notes=(), hosts=(host,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A checkout with records."""
    layout = Layout(tmp_path_factory.mktemp("fleet"))
    write_records(layout)
    return layout


@pytest.fixture(scope="module")
def receipt(at: Layout) -> records.TrackReceipt:
    """Its receipt, after the sqlite store was told once."""
    return track.run(slice_of(), at)


def rows(at: Layout, query: str, *values: str) -> list[Any]:
    """Ask the store of a checkout, past MLflow."""
    with closing(sqlite3.connect(at.root / "work/mlflow.db")) as store:
        return store.execute(query, values).fetchall()


def active_runs(at: Layout) -> set[str]:
    """Return the ids of the runs that a person sees."""
    return {row[0] for row in rows(at, "select run_uuid from runs where lifecycle_stage='active'")}


def run_id(at: Layout, run_key: str) -> str:
    """Find the one active run of a key by its tag, as anybody who reads a receipt does."""
    query = "select run_uuid from tags where key='fleet.run_key' and value=?"
    (found,) = {row[0] for row in rows(at, query, run_key)} & active_runs(at)
    return str(found)


# --- a sqlite file ----------------------------------------------------------------------------


def test_each_measured_quant_is_one_run_with_its_numbers(
    at: Layout, receipt: records.TrackReceipt
) -> None:
    """The store holds a run for each quant: parameters, metrics by depth, origin, records."""
    own = run_id(at, next(run.run_key for run in receipt.runs if run.key == "tiny-Q4_0"))
    metrics = dict(rows(at, "select key, value from latest_metrics where run_uuid=?", own))
    params = dict(rows(at, "select key, value from params where run_uuid=?", own))
    tags = dict(rows(at, "select key, value from tags where run_uuid=?", own))
    kept = at.root / "work/mlartifacts" / own / "artifacts/records/benchmark.json"

    assert receipt.status == "tracked"
    assert active_runs(at) == {run_id(at, run.run_key) for run in receipt.runs}
    assert metrics["decode_tok_s_d0"] == 50.0
    assert metrics["decode_tok_s_d256"] == 49.0
    assert metrics["memory_mib"] == 12.5
    assert params["type"] == "Q4_0"
    assert params["context_tokens"] == "512"
    assert params["imatrix"] == "False"
    assert tags["fleet.revision"] == "a" * 40
    assert tags["fleet.llama_cpp_commit"] == "c" * 40
    assert tags["fleet.gguf_sha256"] == "4" * 64
    assert tags["fleet.hw_id"] == "hw1"
    assert tags["fleet.verdict"] == "CHOSEN"
    assert kept.read_bytes() == at.quant_record("benchmark", "tiny", "Q4_0").read_bytes()
    assert not (at.root / "mlruns").exists()


def test_two_clones_write_the_same_receipt(
    at: Layout, receipt: records.TrackReceipt, tmp_path: Path
) -> None:
    """Equal records make an equal receipt, byte for byte, whatever ids MLflow draws."""
    clone = Layout(tmp_path)
    write_records(clone)
    other = track.run(slice_of(), clone)
    for layout, told in ((at, receipt), (clone, other)):
        records.write(layout.receipt("tiny"), told)

    assert other.status == "tracked"
    assert active_runs(clone).isdisjoint(active_runs(at))
    assert clone.receipt("tiny").read_bytes() == at.receipt("tiny").read_bytes()


def test_telling_twice_makes_no_second_run(at: Layout, receipt: records.TrackReceipt) -> None:
    """The same records give the same runs, under the same ids."""
    before = active_runs(at)

    again = track.run(slice_of(), at)

    assert again == receipt
    assert active_runs(at) == before


def test_verdict_follows_the_choice_and_the_run_stays(
    at: Layout, receipt: records.TrackReceipt
) -> None:
    """Another choice changes tags, the kept choice and the receipt, on which reports depend."""
    records.write(at.model_record("choose", "tiny"), choice_record("Q8_0"))

    again = track.run(slice_of(), at)

    verdicts = {
        run.key: rows(
            at,
            "select value from tags where run_uuid=? and key='fleet.verdict'",
            run_id(at, run.run_key),
        )[0][0]
        for run in again.runs
    }
    own = run_id(at, again.runs[0].run_key)
    kept = at.root / "work/mlartifacts" / own / "artifacts/records/choice.json"
    assert again.runs == receipt.runs
    assert again.choice_sha256 != receipt.choice_sha256
    assert verdicts == {"tiny-Q8_0": "CHOSEN", "tiny-Q4_0": "PASS"}
    assert kept.read_bytes() == at.model_record("choose", "tiny").read_bytes()


def load_test(
    type_: str, *, concurrency: tuple[int, ...] = (1, 2), ttft_ms: float = 20.0
) -> LoadTestRecord:
    """Build the load test of one quant of this fleet."""
    runs = tuple(load_run(many, hosts=["here"], ttft_ms=ttft_ms) for many in concurrency)
    file = served(type_, gguf_sha256=("8" if type_ == "Q8_0" else "4") * 64)
    return load_test_record(
        {"here": type_}, "tiny", winners=(winner_test(type_, ["here"], served=file, runs=runs),)
    )


def metric(at: Layout, receipt: records.TrackReceipt, key: str, name: str) -> float | None:
    """Ask the store for the latest value of a metric; None if it is NaN, i.e. not measured."""
    own = run_id(at, next(run.run_key for run in receipt.runs if run.key == key))
    query = "select value, is_nan from latest_metrics where run_uuid=? and key=?"
    ((value, is_nan),) = rows(at, query, own, name)
    return None if is_nan else float(value)


def tag(at: Layout, receipt: records.TrackReceipt, key: str, name: str) -> str:
    """Ask the store for a tag."""
    own = run_id(at, next(run.run_key for run in receipt.runs if run.key == key))
    ((value,),) = rows(at, "select value from tags where run_uuid=? and key=?", own, name)
    return str(value)


def test_the_load_test_of_the_winner_is_on_its_run(tmp_path: Path) -> None:
    """A new load test changes the run of what it served, and no run is made twice for it."""
    at = Layout(tmp_path)
    write_records(at)
    path = at.model_record("load-test", "tiny")
    before = track.run(slice_of(), at)
    records.write(path, load_test("Q4_0", ttft_ms=20.0))
    first = track.run(slice_of(), at)
    assert metric(at, first, "tiny-Q4_0", "load-test/ttft_p50_ms_c2") == 40.0

    records.write(path, load_test("Q4_0", ttft_ms=30.0, concurrency=(1,)))
    second = track.run(slice_of(), at)

    assert before.load_test_sha256 is None
    assert second.load_test_sha256 != first.load_test_sha256
    assert second.runs == before.runs
    assert active_runs(at) == {run_id(at, run.run_key) for run in before.runs}
    assert metric(at, second, "tiny-Q4_0", "load-test/ttft_p50_ms_c1") == 30.0
    # The newer test has no second concurrency.
    assert metric(at, second, "tiny-Q4_0", "load-test/ttft_p50_ms_c2") is None
    assert tag(at, second, "tiny-Q4_0", "fleet.engine") == "ollama"
    assert tag(at, second, "tiny-Q4_0", "fleet.engine_version") == "0.33.0"
    assert tag(at, second, "tiny-Q8_0", "fleet.engine") == "none"


def test_a_receipt_follows_what_was_published(tmp_path: Path) -> None:
    """The report depends on receipts alone, and says what was released."""
    at = Layout(tmp_path)
    write_records(at)
    before = track.run(slice_of(), at)
    path = at.model_record("publish", "tiny")
    path.write_text("{}")

    after = track.run(slice_of(), at)

    assert before.publish_sha256 is None
    assert after.publish_sha256 == hashlib.sha256(b"{}").hexdigest()
    assert after.runs == before.runs


def test_a_load_test_that_came_back_is_shown_again(tmp_path: Path) -> None:
    """After a revert the older test counts again; a quant that lost its place has no numbers."""
    at = Layout(tmp_path)
    write_records(at)
    path = at.model_record("load-test", "tiny")
    older, newer = load_test("Q4_0", ttft_ms=20.0), load_test("Q8_0", ttft_ms=30.0)
    records.write(path, older)
    track.run(slice_of(), at)
    records.write(path, newer)
    receipt = track.run(slice_of(), at)
    assert metric(at, receipt, "tiny-Q4_0", "load-test/ttft_p50_ms_c1") is None
    assert metric(at, receipt, "tiny-Q8_0", "load-test/ttft_p50_ms_c1") == 30.0

    records.write(path, older)
    receipt = track.run(slice_of(), at)
    runs = active_runs(at)

    assert track.run(slice_of(), at) == receipt
    assert active_runs(at) == runs
    assert metric(at, receipt, "tiny-Q4_0", "load-test/ttft_p50_ms_c1") == 20.0
    assert metric(at, receipt, "tiny-Q8_0", "load-test/ttft_p50_ms_c1") is None


def test_a_load_test_of_another_file_gives_no_numbers(tmp_path: Path) -> None:
    """What was served under the same name but with other bytes is no metric of this quant."""
    at = Layout(tmp_path)
    write_records(at)
    tested = load_test_record({"here": "Q4_0"}, "tiny")
    records.write(at.model_record("load-test", "tiny"), tested)

    receipt = track.run(slice_of(), at)

    assert rows(at, "select key from latest_metrics where key like 'load-test/%'") == []
    assert tag(at, receipt, "tiny-Q4_0", "fleet.engine") == "none"


def test_new_measurement_is_a_new_run_and_an_unfinished_one_is_replaced(
    at: Layout, receipt: records.TrackReceipt
) -> None:
    """Other numbers make a run beside the old one; a run cut by a kill is deleted and made anew."""
    cut, measured_again = receipt.runs
    cut_id, measured_again_id = (run_id(at, run.run_key) for run in receipt.runs)
    with closing(sqlite3.connect(at.root / "work/mlflow.db")) as store:
        store.execute("delete from tags where key='fleet.complete' and run_uuid=?", (cut_id,))
        store.commit()
    path = at.quant_record("benchmark", "tiny", "Q4_0")
    records.write(path, benchmark_record("tiny-Q4_0", "Q4_0", "4" * 64, 60.0))

    again = track.run(slice_of(), at)

    made_anew, beside = again.runs
    assert made_anew.run_key == cut.run_key
    assert run_id(at, made_anew.run_key) != cut_id
    assert beside.run_key != measured_again.run_key
    now = {run_id(at, run.run_key) for run in again.runs}
    assert active_runs(at) == {*now, measured_again_id}


def test_lost_store_is_rebuilt_from_results(at: Layout, receipt: records.TrackReceipt) -> None:
    """A damaged store is pending; without it `rebuild` tells a new one what results/ holds."""
    store = at.root / "work/mlflow.db"
    store.write_bytes(b"this is no database" * 1000)

    damaged = track.run(slice_of(), at)
    store.unlink()
    # What a kill leaves while the tables of a new store are made.
    store.with_name(".mlflow.db.part").write_bytes(b"half a database")
    rebuilt = track.rebuild(slice_of(), at)

    assert damaged.status == "pending"
    assert rebuilt.status == "tracked"
    assert {run.key for run in rebuilt.runs} == {run.key for run in receipt.runs}
    assert active_runs(at) == {run_id(at, run.run_key) for run in rebuilt.runs}
    assert rows(at, "pragma integrity_check") == [("ok",)]
    assert [path.name for path in store.parent.glob("*mlflow.db*")] == ["mlflow.db"]


def test_benchmark_of_another_gguf_is_never_told(tmp_path: Path) -> None:
    """A benchmark that measured other bytes than those that were quantized is an error."""
    at = Layout(tmp_path)
    write_records(at)
    records.write(
        at.quant_record("benchmark", "tiny", "Q4_0"),
        benchmark_record("tiny-Q4_0", "Q4_0", "9" * 64, 50.0),
    )

    with pytest.raises(DigestError, match="measured 999999999999"):
        track.run(slice_of(), at)


def test_a_quant_without_records_is_named_and_the_others_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One benchmark that is missing costs its own run and a warning, not the stage."""
    at = Layout(tmp_path)
    write_records(at)
    at.quant_record("benchmark", "tiny", "Q4_0").unlink()

    receipt = track.run(slice_of(), at)

    assert receipt.status == "tracked"
    assert [run.key for run in receipt.runs] == ["tiny-Q8_0"]
    assert receipt.missing == ("tiny-Q4_0",)
    assert "tiny-Q4_0 is not tracked: " in capsys.readouterr().err


def test_a_model_without_a_choice_is_an_error(tmp_path: Path) -> None:
    """Without the records of the model itself there is nothing to tell of any quant."""
    at = Layout(tmp_path)
    write_records(at)
    at.model_record("choose", "tiny").unlink()

    with pytest.raises(records.RecordError, match=r"choice\.json does not exist"):
        track.run(slice_of(), at)


# --- servers ----------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(directory: Path) -> Iterator[str]:
    """Run a real `mlflow server` on the loopback."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"),
            *("--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{directory}/server.db"),
            *("--artifacts-destination", str(directory / "artifacts")),
        ],
        cwd=directory,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not is_healthy(port):
            assert process.poll() is None, "mlflow server ended"
            assert time.monotonic() < deadline, "mlflow server is not healthy"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and the group."""
    import os  # noqa: PLC0415 - only here
    import signal  # noqa: PLC0415 - only here

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_healthy(port: int) -> bool:
    """Tell whether an MLflow server on the loopback answers."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_server_holds_each_run_once_with_its_artifacts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real MLflow server gets the runs by HTTP, records included, and gets none twice."""
    # The server shares this machine with the tests; how soon it answers is not the question here.
    monkeypatch.setattr(track, "_ANSWER_WITHIN_S", 100)
    at = Layout(tmp_path / "fleet")
    write_records(at)
    server = tmp_path / "server"
    server.mkdir()

    with mlflow_server(server) as uri:
        first = track.run(slice_of(uri), at)
        second = track.run(slice_of(uri), at)

    with closing(sqlite3.connect(server / "server.db")) as store:
        runs = store.execute("select value from tags where key='fleet.run_key'").fetchall()
    assert first.status == "tracked"
    assert second == first
    assert sorted(row[0] for row in runs) == sorted(run.run_key for run in first.runs)
    assert len(list(server.glob("artifacts/**/benchmark.json"))) == 2


class _Broken(BaseHTTPRequestHandler):
    """A server that answers its health check and fails at everything else, one way or another."""

    health = 200
    hangs = False
    seen: list[str]

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization", ""))  # type: ignore[attr-defined]
        if self.path == "/health" and self.health == 200:
            self.answer(200)
        elif self.hangs:
            time.sleep(60)
        else:
            self.answer(500)

    do_POST = do_GET  # noqa: N815 - the name that http.server calls

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def broken_server(**how: Any) -> Iterator[tuple[str, list[str]]]:
    """Run a broken server; yield its address and the credentials that it was shown."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Broken,), how))
    server.daemon_threads = True
    server.block_on_close = False
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", server.seen  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Listen, accept, and never say a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_server_that_is_down_leaves_a_warning_and_a_pending_receipt(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody listening is a warning with the reason, and a receipt that will be tried again."""
    receipt = track.run(slice_of(f"http://127.0.0.1:{free_port()}"), at)

    assert receipt.status == "pending"
    assert receipt.runs == ()
    assert "Connection refused" in receipt.reason
    assert "warning: " in capsys.readouterr().err


def test_server_that_never_answers_does_not_hold_up_the_chain(at: Layout) -> None:
    """A server that accepts and stays silent is given up."""
    with silent_server() as address:
        receipt = track.run(slice_of(f"http://{address}"), at)

    assert receipt.status == "pending"
    assert "does not answer" in receipt.reason


def test_server_error_is_named(at: Layout) -> None:
    """A server that answers 500 is named as such, and rebuild fails with that reason."""
    with broken_server(health=500) as (address, _):
        receipt = track.run(slice_of(f"http://{address}"), at)
        with pytest.raises(StoreError, match="answers 500"):
            track.rebuild(slice_of(f"http://{address}"), at)

    assert "answers 500" in receipt.reason


def test_server_that_hangs_later_is_given_up_and_learns_no_more_than_it_must(
    at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server, healthy and then silent, is given up; its credentials are in no text of ours."""
    with broken_server(hangs=True) as (address, seen):
        receipt = track.run(slice_of(f"http://operator:s3cret@{address}"), at)

    written = [path.read_text() for path in (at.root / "work/logs").rglob("*.log")]
    told = [receipt.model_dump_json(), capsys.readouterr().err, *written]
    assert receipt.status == "pending"
    assert any(header.startswith("Basic ") for header in seen)
    assert not any("s3cret" in text for text in told)
    assert any(f"http://{address}" in text for text in told)


# --- receipts ---------------------------------------------------------------------------------


def test_pending_receipts_are_withdrawn_and_tracked_ones_stay(tmp_path: Path) -> None:
    """Only what was not told is asked for again."""
    at = Layout(tmp_path)
    told = records.TrackReceipt(model="told", status="tracked", reason="", runs=())
    records.write(at.receipt("told"), told)
    records.write(at.receipt("away"), told.model_copy(update={"status": "pending"}))
    at.receipt("cut").write_text("{")

    assert track.withdraw_pending(at) == ["away", "cut"]
    assert [path.stem for path in at.receipt("told").parent.iterdir()] == ["told"]


def test_dvc_runs_a_withdrawn_stage_again(tmp_path: Path) -> None:
    """DVC does not bring a pending receipt back from its cache: the stage runs again."""
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["track"]["do"]
    outs = json.loads(json.dumps(stage["outs"]).replace("${key}", "tiny"))
    pending = records.TrackReceipt(model="tiny", status="pending", reason="down", runs=())
    receipt = tmp_path / "work/track/tiny.json"
    graph = {
        "cmd": f"echo x >> ran; mkdir -p work/track; echo '{pending.model_dump_json()}' "
        "> work/track/tiny.json",
        "deps": ["results.json"],
        "outs": outs,
    }
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"track": graph}}))
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "-q", "--no-scm"], cwd=tmp_path, check=True)

    for _ in range(2):
        subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, check=True)
    assert (tmp_path / "ran").read_text() == "x\n"
    assert track.withdraw_pending(Layout(tmp_path)) == ["tiny"]
    assert not receipt.exists()
    subprocess.run([*dvc, "repro", "-q"], cwd=tmp_path, check=True)

    assert (tmp_path / "ran").read_text() == "x\nx\n"


def test_model_without_quants_is_told_to_nobody(tmp_path: Path) -> None:
    """Where nothing is declared there is nothing to tell, and no store is made."""
    slice_ = TrackSlice(model="tiny", quants={}, track=Track())

    receipt = track.run(slice_, Layout(tmp_path))

    assert receipt.status == "tracked"
    assert not (tmp_path / "work").exists()
