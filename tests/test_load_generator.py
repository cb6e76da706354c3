"""The generator sends what was planned, when it was planned, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import serving_factory
from scripted_server import Script, Scripted, serve
from test_load_dialects import prompt, target

from pipelines import atomic
from pipelines.errors import ToolError
from pipelines.layout import Layout
from pipelines.load import generator, measures, plan
from pipelines.serving import server as servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.load.generator import Raw
    from pipelines.serving.engine import Engine
    from pipelines.serving.server import Loaded
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Output of the processes."""
    return tmp_path / "logs/load.log"


def closed(count: int, concurrency: int = 1, warm_up: int = 0, **changes: Any) -> plan.Plan:
    """A closed run of requests that say their number."""
    fields: dict[str, Any] = {"max_run_s": 30, "seed": 1}
    return plan.closed(
        "closed",
        concurrency=concurrency,
        prompts=[prompt(str(number)) for number in range(count + warm_up)],
        warm_up_requests=warm_up,
        **(fields | changes),
    )


def said(server: Scripted) -> list[str]:
    """Last messages that the server got, in the order in which they came."""
    return [seen.body["messages"][-1]["content"] for seen in server.seen]


def run(planned: plan.Plan, server: Scripted, log: Path, **changes: Any) -> Raw:
    """Send a plan to the scripted server."""
    return generator.run(planned, target(server.url, **changes), log=log)


# --- what is sent -----------------------------------------------------------------------------


def test_every_prompt_is_sent_once_and_the_warm_up_is_not_counted(log: Path) -> None:
    """Answers come in the order of the prompts, whichever ended first."""
    planned = closed(20, concurrency=4, warm_up=3)
    with serve() as server:
        raw = run(planned, server, log)

    assert sorted(map(int, said(server))) == list(range(23))
    assert set(said(server)[:3]) == {"0", "1", "2"}
    assert [answer.index for answer in raw.answers] == list(range(3, 23))
    assert [answer.index for answer in raw.warm_up] == [0, 1, 2]
    assert all(answer.ok for answer in raw.answers)
    assert measures.texts(planned, raw) == list(raw.answers)


def test_a_virtual_user_keeps_its_connection(log: Path) -> None:
    """A run of four users opens four connections, those of the warm-up."""
    with serve(Script(pause_s=0.01)) as server:
        run(closed(40, concurrency=4, warm_up=4), server, log)

    assert len({seen.connection for seen in server.seen}) == 4


def test_a_kept_connection_that_the_server_closed_is_no_failure(log: Path) -> None:
    """Servers close them whenever they like; the request is sent on a new one."""
    with serve(Script(close=True)) as server:
        raw = run(closed(30, concurrency=2), server, log)

    assert [answer.error for answer in raw.answers] == [None] * 30
    assert len(server.seen) == 30


def test_a_request_that_was_read_is_not_sent_again(log: Path) -> None:
    """A server that ends after it had the request for a while has failed."""
    with serve({"0": Script(), "1": Script(fault="stall_before")}) as server:
        stopper = threading.Timer(0.5, server.stopped.set)
        stopper.start()
        raw = run(closed(2), server, log, timeout_s=20.0)

    assert [answer.error for answer in raw.answers] == [None, "connect"]
    assert said(server) == ["0", "1"]


def test_the_environment_neither_diverts_nor_adds(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy would be measured; a key is sent because it was given for this."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("GGUF_FLEET_API_KEY", "planted-key")

    with serve() as server:
        raw = run(closed(1), server, log)

    assert raw.answers[0].ok
    assert server.seen[0].headers["authorization"] == "Bearer planted-key"
    assert "planted-key" not in log.read_text()


# --- when -------------------------------------------------------------------------------------


def test_an_open_run_does_not_wait_for_a_server_that_stalls(log: Path) -> None:
    """Users come although nobody answers, and their wait counts from the moment they came."""
    planned = plan.open_loop(
        "open",
        rate_per_s=60.0,
        prompts=[prompt(str(number)) for number in range(40)],
        warm_up_requests=0,
        max_run_s=30,
        seed=2,
    )
    stall_s = 1.5
    with serve({"": Script(), "0": Script(first_s=stall_s)}, slots=1) as server:
        raw = run(planned, server, log, timeout_s=20.0)

    stalled_ns = server.seen[0].at_ns + int(stall_s * 1e9)
    assert max(seen.at_ns for seen in server.seen) < stalled_ns
    assert raw.threads_count > 30
    for answer in raw.answers:
        came_s = planned.arrivals_s[answer.index] - planned.arrivals_s[0]
        assert measures.ttft_ms(answer) >= (stall_s - came_s) * 1000 - 50
        assert answer.first_ns is not None
        assert answer.first_ns > stalled_ns - 50_000_000
        scheduled_s = (answer.scheduled_ns - raw.started_ns) / 1e9
        assert scheduled_s == pytest.approx(planned.arrivals_s[answer.index], abs=1e-6)


def test_a_closed_run_waits_for_its_answers(log: Path) -> None:
    """Never more in flight than there are users."""
    with serve(Script(first_s=0.05, tokens=2)) as server:
        raw = run(closed(12, concurrency=3), server, log)

    spans = [(answer.sent_ns, answer.end_ns) for answer in raw.answers]
    flying = [sum(begin <= at < end for begin, end in spans) for at, _ in spans]
    assert max(flying) == 3


def test_a_chunk_is_stamped_when_it_comes(log: Path) -> None:
    """Not when the next one does, nor when the answer is whole."""
    with serve(Script(tokens=5, pause_s=0.1)) as server:
        raw = run(closed(1, keep_stamps=True), server, log)

    stamps = raw.answers[0].stamps_ns
    assert len(stamps) == 5
    pauses_ms = [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(stamps)]
    assert min(pauses_ms) > 50
    assert sum(raw.gaps_us.values()) == 4
    assert raw.answers[0].texts == ("tok0 ", "tok1 ", "tok2 ", "tok3 ", "tok4 ")


def test_chunks_that_came_together_have_no_pause_between_them(log: Path) -> None:
    """What a server wrote at once is one arrival."""
    with serve(Script(tokens=20, merged=True)) as server:
        raw = run(closed(1), server, log)

    assert raw.answers[0].chunks_count == 20
    assert raw.gaps_us == {}
    assert raw.answers[0].stamps_ns == ()


def test_after_the_time_of_a_run_nothing_is_sent(log: Path) -> None:
    """What was sent is measured, and the rest is said."""
    planned = closed(50, concurrency=2, max_run_s=0.5)
    with serve(Script(first_s=0.2, tokens=1)) as server:
        raw = run(planned, server, log)

    assert 2 <= len(raw.answers) < 15
    assert len(raw.answers) + raw.unsent_count == 50
    note = measures.summarise(planned, raw, {}).notes[0]
    assert note.startswith(f"{raw.unsent_count} of 50 requests were not sent: the run had lasted")


def test_an_open_run_ends_in_time_as_well(log: Path) -> None:
    """Arrivals after the end of the run do not come."""
    planned = plan.open_loop(
        "open",
        rate_per_s=20.0,
        prompts=[prompt("x")] * 100,
        warm_up_requests=0,
        max_run_s=0.5,
        seed=2,
    )
    with serve() as server:
        raw = run(planned, server, log)

    expected = sum(at < 0.5 for at in planned.arrivals_s)
    assert len(raw.answers) == expected
    assert raw.unsent_count == 100 - expected


def test_progress_hears_of_every_second(log: Path) -> None:
    """Work that takes longer than two seconds shows that it goes on."""
    told: list[float] = []

    class Listener:
        def update(self, done: float, _: str = "") -> None:
            told.append(done)

    planned = closed(4)
    with serve(Script(first_s=0.6, tokens=1)) as server:
        generator.run(planned, target(server.url), log=log, progress=Listener())  # type: ignore[arg-type]

    assert told
    assert told == sorted(told)
    assert told[-1] <= 4


# --- how it ends ------------------------------------------------------------------------------

_CHILD = """
    import sys
    from pathlib import Path
    from test_load_dialects import prompt, target
    from pipelines.load import generator, plan

    planned = plan.closed("x", concurrency=3, prompts=[prompt("a")] * 9, warm_up_requests=0,
                          max_run_s=60, seed=1)
    try:
        generator.run(planned, target(sys.argv[1], timeout_s=60.0), log=Path(sys.argv[2]))
    except KeyboardInterrupt:
        raise SystemExit(130)
"""


@pytest.fixture
def running(log: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start a run in a process of its own."""
    children = []

    def start(url: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_CHILD), url, str(log)],
            env={**os.environ, "PYTHONPATH": path},
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.wait()


def wait_until(condition: Callable[[], Any], what: str, within_s: float = 20.0) -> None:
    """Wait for something that happens in another process."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {within_s:g} s"
        time.sleep(0.02)


def workers(log: Path) -> list[psutil.Process]:
    """The generator's processes that belong to this log."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "pipelines.load.worker" in words and any(str(log.parent) in word for word in words):
            found.append(process)
    return found


def test_interrupt_ends_the_process_and_leaves_nothing(
    log: Path, running: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Ctrl-C while every request waits for a server that says nothing."""
    with serve(Script(fault="stall")) as server:
        child = running(server.url)
        wait_until(lambda: len(server.seen) == 3, "the third request")
        child.send_signal(signal.SIGINT)

        assert child.wait(timeout=20) == 130

    wait_until(lambda: not workers(log), "the end of the generator")
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_killed_run_takes_its_process_along(
    log: Path, running: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Nobody sends on when nobody listens; the next run removes the files of the dead one."""
    with serve({"": Script(), "a": Script(fault="stall")}) as server:
        child = running(server.url)
        wait_until(lambda: len(server.seen) == 3, "the third request")
        child.kill()
        child.wait()

        wait_until(lambda: not workers(log), "the end of the generator")
        left = [path for path in log.parent.iterdir() if path != log]
        assert [path.name.endswith(atomic.PART_SUFFIX) for path in left] == [True]

        assert run(closed(1), server, log).answers[0].ok
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_generator_that_dies_is_said(log: Path) -> None:
    """Without an end there is no result, whatever was measured until then."""

    def kill() -> None:
        wait_until(lambda: workers(log), "the start of the generator")
        wait_until(lambda: server.seen, "a request")
        workers(log)[0].kill()

    with serve(Script(fault="stall")) as server:
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ToolError, match="was killed"):
            run(closed(1), server, log, timeout_s=60.0)
        killer.join()

    assert [path.name for path in log.parent.iterdir()] == [log.name]


# --- real servers -----------------------------------------------------------------------------


@pytest.fixture(params=["ollama", "llama-server"])
def loaded(
    request: pytest.FixtureRequest, tools: Toolchain, engine: Engine, tmp_path: Path
) -> Iterator[Loaded]:
    """A small model behind the real servers, with two slots."""
    used = engine
    if request.param == "llama-server":
        used = serving_factory.engine("llama-server", tools, tools.tool("llama-server"))
    file = serving_factory.file(serving_factory.model(tmp_path / "model.gguf"))
    settings = serving_factory.settings()
    at = Layout(tmp_path)
    with (
        servers.open_host(used, settings, model="m", at=at, log=tmp_path / "server.log") as host,
        host.load(file) as ready,
    ):
        yield ready


def of(loaded: Loaded, **changes: Any) -> plan.Target:
    """The target that a loaded model is."""
    fields: dict[str, Any] = {
        "model": loaded.name,
        "generate_tokens": 100,
        "timeout_s": 60.0,
        "context_tokens": 512,
    }
    return target(loaded.url, loaded.api, **(fields | changes))


@pytest.mark.alone
@pytest.mark.toolchain
def test_a_real_server_answers_every_request(loaded: Loaded, log: Path) -> None:
    """Counts of tokens are the server's, and the two slots that it has are found."""
    planned = closed(24, concurrency=6, warm_up=2)

    raw = generator.run(planned, of(loaded), log=log)

    # The weights are random: now and then the first token is the one that ends an answer.
    fine = [answer for answer in raw.answers if answer.error != "empty_output"]
    assert [answer.error for answer in fine] == [None] * len(fine)
    assert len(fine) > 18
    for answer in fine:
        text = planned.prompts[answer.index].messages
        assert answer.prompt_tokens == loaded.prompt_tokens(text)
        assert answer.output_tokens is not None
        assert answer.done_reason == ("length" if answer.output_tokens == 100 else "stop")
        # Bytes of half a character are held back until the other half is there.
        assert 0 < answer.chunks_count <= answer.output_tokens
    summary = measures.summarise(planned, raw, {})
    assert summary.effective_slots == 2
    assert (summary.queue_ms is not None) is (loaded.api == "ollama")
    loaded.verify()


@pytest.mark.alone
@pytest.mark.toolchain
def test_a_request_does_not_load_a_real_ollama_again(loaded: Loaded, log: Path) -> None:
    """Warm-up and run ask with the same options; another `shift` would start it anew."""
    generator.run(closed(4, warm_up=1), of(loaded), log=log)
    generator.run(closed(4), of(loaded, temperature=0.7, generate_tokens=5), log=log)

    loaded.verify()


@pytest.mark.alone
@pytest.mark.toolchain
def test_a_prompt_that_does_not_fit_is_refused_and_not_cut(loaded: Loaded, log: Path) -> None:
    """Both real servers say so with a status, since they were told not to cut."""
    planned = plan.closed(
        "long",
        concurrency=1,
        prompts=[prompt("state " * 2000)],
        warm_up_requests=0,
        max_run_s=30,
        seed=1,
    )

    answer = generator.run(planned, of(loaded), log=log).answers[0]

    assert answer.error == "http_4xx", answer
    assert "context" in answer.detail


@pytest.mark.alone
@pytest.mark.toolchain
def test_a_real_server_that_dies_in_an_answer_is_an_error(
    loaded: Loaded, log: Path, tmp_path: Path
) -> None:
    """The program that generates is killed while it does: no success, on either server."""

    def kill() -> None:
        wait_until(lambda: log.parent.exists() and workers(log), "the start of the generator")
        time.sleep(0.7)
        for process in serving_factory.programs_in(Layout(tmp_path)):
            if "llama-server" in process.name():
                process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    raw = generator.run(
        closed(400, concurrency=4, max_run_s=3), of(loaded, generate_tokens=350), log=log
    )
    killer.join()

    # The weights are random: now and then the first token is the one that ends an answer.
    errors = {answer.error for answer in raw.answers} - {None, "empty_output"}
    # Ollama has an error line for the stream that broke, and a 500 for what waited behind it.
    expected = {"error_in_stream", "http_5xx"}
    if loaded.api == "openai":
        expected = {"truncated_stream", "connect"}
    assert errors
    assert errors <= expected
