"""A client that is too slow is found out before a gate believes it, and only the client is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from test_load_generator import ROOT, wait_until, workers

from pipelines.load import calibration, measures, null_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.load.plan import Api
    from pipelines.load_records import Calibration

# More than any machine under test adds to a chunk, and less than what is planted.
ENDLESS_MS = 60_000.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Output of the processes."""
    return tmp_path / "logs/load.log"


def calibrate(log: Path, **changes: Any) -> Calibration:
    """Four streams of 40 chunks at 50/s, and a limit that nothing misses."""
    fields: dict[str, Any] = {
        "streams": 4,
        "chunks": 40,
        "chunks_per_s": 50.0,
        "api": "ollama",
        "limit_ms": ENDLESS_MS,
    }
    return calibration.calibrate(log=log, **(fields | changes))


def null_servers() -> list[psutil.Process]:
    """The null servers that this test process started."""
    found = []
    for child in psutil.Process().children():
        try:
            if "pipelines.load.null_server" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def hold_up(log: Path) -> Iterator[Callable[..., None]]:
    """Stop a process for a while, as a machine does that has too much to do."""
    threads = []

    def held(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
        wait_until(find, "the start of the process")
        # The chunks of the warm-up do not count, nor do those before it.
        wait_until(lambda: workers(log), "the start of the generator")
        time.sleep(2.0)
        for process in find():
            process.suspend()
        time.sleep(seconds)
        for process in find():
            process.resume()

    def start(find: Callable[[], list[psutil.Process]], seconds: float) -> None:
        thread = threading.Thread(target=held, args=(find, seconds))
        threads.append(thread)
        thread.start()

    yield start
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("api", ["ollama", "openai"])
def test_the_client_is_measured_at_the_pace_of_the_run(api: Api, log: Path) -> None:
    """As many streams, as many chunks a second; in either dialect."""
    found = calibrate(log, api=api, chunks_per_s=200.0, send_lag_p99_ms=1.5)

    assert (found.streams_count, found.chunks_per_s) == (4, 200.0)
    assert 0 < found.delay_p50_ms <= found.delay_p99_ms < ENDLESS_MS
    assert found.cpu_s_per_1000_chunks > 0
    assert found.send_lag_p99_ms == 1.5
    assert (found.client_bound, found.reason) == (False, "")


def test_a_chunk_is_stamped_before_the_next_one_is_sent(log: Path) -> None:
    """Nothing waits for a full block or for the next line: half of all within half a pause."""
    found = calibration.footprint(
        streams=2, chunks=20, chunks_per_s=10.0, api="openai", log=log, rounds=1
    )

    assert len(found.delays_ms) == 40
    assert measures.percentile(found.delays_ms, 0.5) < 50


def test_a_client_that_is_held_up_is_client_bound(log: Path, hold_up: Callable[..., None]) -> None:
    """The generator is stopped for 600 ms in the middle; the reason says by how much."""
    hold_up(lambda: workers(log), 0.6)

    found = calibrate(log, chunks=100, limit_ms=100.0)

    assert found.client_bound
    assert found.delay_p99_ms > 100
    assert found.reason.startswith(f"the client adds {found.delay_p99_ms:.0f} ms to 1 of 100")
    assert "100.0 ms are allowed" in found.reason


def test_a_null_server_that_is_late_is_not_held_against_the_client(
    log: Path, hold_up: Callable[..., None]
) -> None:
    """It is stopped for 600 ms; its chunks come late and say so."""
    hold_up(null_servers, 0.6)

    found = calibrate(log, chunks=100, limit_ms=300.0)

    assert found.null_late_p99_ms is not None
    assert found.null_late_p99_ms > 300
    assert found.delay_p99_ms < 300
    assert not found.client_bound


def test_requests_that_left_late_make_a_run_client_bound(log: Path) -> None:
    """Ten milliseconds after its time, by 99 of 100."""
    found = calibrate(log, chunks_per_s=500.0, send_lag_p99_ms=25.0)

    assert found.client_bound
    assert found.reason == "1 of 100 requests left 25.0 ms after its time, 10 ms are allowed"
    assert not calibrate(log, chunks_per_s=500.0, send_lag_p99_ms=10.0).client_bound


def test_a_null_server_that_dies_is_no_measurement(log: Path) -> None:
    """There is nothing to judge the client by."""

    def kill() -> None:
        wait_until(lambda: workers(log) and null_servers(), "the start")
        time.sleep(1.0)
        null_servers()[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(calibration.CalibrationError, match="answers of the null server failed"):
        calibrate(log, chunks=500)
    killer.join()


def test_no_null_server_outlives_its_use(log: Path) -> None:
    """Neither after a success nor after a failure of whoever used it."""
    with null_server.running(log) as url:
        assert url.startswith("http://127.0.0.1:")
        assert len(null_servers()) == 1
    assert null_servers() == []

    with pytest.raises(ZeroDivisionError), null_server.running(log):
        raise ZeroDivisionError
    assert null_servers() == []


_CHILD = """
    import sys
    from pathlib import Path
    from pipelines.load import calibration

    try:
        calibration.calibrate(streams=2, chunks=3000, chunks_per_s=100.0, api="ollama",
                              limit_ms=1.0, log=Path(sys.argv[1]))
    except KeyboardInterrupt:
        raise SystemExit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_ends_both_processes(log: Path, number: signal.Signals) -> None:
    """Ctrl-C and kill -9, in the middle of a calibration."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_CHILD), str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        wait_until(lambda: log.parent.exists() and workers(log), "the start of the generator")
        below = psutil.Process(child.pid).children(recursive=True)
        assert len(below) == 2
        child.send_signal(number)

        assert child.wait(timeout=20) in (130, -signal.SIGKILL)
        wait_until(lambda: not any(each.is_running() for each in below), "the end of both")
    finally:
        child.kill()
        child.wait()
