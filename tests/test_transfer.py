"""Requests are repeated while that may help and there is time; progress tells rate and rest."""

from __future__ import annotations

import email.utils
import http.server
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import botocore.exceptions
import pytest
import requests

from pipelines.errors import DigestError, RetryLaterError, StoreError
from pipelines.stores import transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.now_s = 0.0
        self.pauses_s: list[float] = []

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let it pass."""
        self.pauses_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    """Nobody waits in a test."""
    return Clock()


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """A real HTTP server that gives these answers in turn, the last one for ever; its address."""
    running = []

    def serve(*answers: tuple[int, dict[str, str]] | None) -> str:
        left = list(answers)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = left.pop(0) if len(left) > 1 else left[0]
                if answer is None:  # cut the connection
                    self.connection.close()
                    return
                self.send_response(answer[0])
                for name, value in answer[1].items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: object) -> None:
                pass

        found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        running.append(found)
        return f"http://127.0.0.1:{found.server_port}/"

    yield serve
    for each in running:
        each.shutdown()
        each.server_close()


def get(address: str) -> Callable[[], str]:
    """Return a request as a store makes it."""

    def call() -> str:
        answer = requests.get(address, timeout=10)
        answer.raise_for_status()
        return answer.text

    return call


def retrying(clock: Clock, call: Callable[[], Any], **changes: Any) -> Any:
    """Make a request on the clock of the test."""
    return transfer.retrying("reading x", call, sleep=clock.sleep, clock=clock, **changes)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(
    server: Callable[..., str], clock: Clock, status: int
) -> None:
    """Two refusals of a busy server, then its answer."""
    address = server((status, {}), (status, {}), (200, {}))

    assert retrying(clock, get(address)) == "ok"
    assert len(clock.pauses_s) == 2


def test_a_connection_that_is_cut_is_tried_again(server: Callable[..., str], clock: Clock) -> None:
    """Nothing answered: nobody knows yet whether something will."""
    assert retrying(clock, get(server(None, None, (200, {})))) == "ok"


def test_a_server_that_is_away_is_given_up_at_the_deadline(clock: Clock) -> None:
    """Port 9 of loopback listens to nobody; the error says what, how often and for how long."""
    with pytest.raises(RetryLaterError, match=r"reading x cannot be reached \(.*in 60 s") as caught:
        retrying(clock, get("http://127.0.0.1:9/"), deadline_s=60.0)

    assert clock.now_s == pytest.approx(60.0)
    assert "Try again later" in caught.value.hint


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_login_is_said_at_once_with_what_to_check(
    server: Callable[..., str], clock: Clock, status: int
) -> None:
    """A token that has expired does not come back by waiting."""
    with pytest.raises(StoreError, match=f"reading x answers {status}") as caught:
        retrying(clock, get(server((status, {}))), credentials="HF_TOKEN")

    assert "HF_TOKEN" in caught.value.hint
    assert "expired" in caught.value.hint
    assert clock.pauses_s == []


@pytest.mark.parametrize("status", [400, 404, 405, 409, 412, 416])
def test_any_other_refusal_is_said_at_once(
    server: Callable[..., str], clock: Clock, status: int
) -> None:
    """The same request gets the same answer."""
    with pytest.raises(StoreError, match=f"answers {status}"):
        retrying(clock, get(server((status, {}))))

    assert clock.pauses_s == []


def test_a_token_that_expires_between_two_attempts_is_not_tried_for_ever(
    server: Callable[..., str], clock: Clock
) -> None:
    """First busy, then refused: the refusal counts."""
    with pytest.raises(StoreError, match="answers 401"):
        retrying(clock, get(server((503, {}), (401, {}))))


def test_a_server_is_asked_again_when_it_wants_to_be(
    server: Callable[..., str], clock: Clock
) -> None:
    """Retry-After in seconds is kept, and not by all clients in the same moment."""
    address = server((429, {"Retry-After": "7"}), (200, {}))

    retrying(clock, get(address))

    assert 7.0 <= clock.pauses_s[0] <= 7.5


def test_a_date_to_try_again_is_read(server: Callable[..., str], clock: Clock) -> None:
    """The other form of Retry-After."""
    then = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)

    retrying(clock, get(server((503, {"Retry-After": then}), (200, {}))))

    assert 15.0 <= clock.pauses_s[0] <= 20.5


@pytest.mark.parametrize("value", ["soon", "", "nan", "inf", "-5", "Mon, 99 Foo"])
def test_a_retry_after_that_means_nothing_delays_nothing(
    server: Callable[..., str], clock: Clock, value: str
) -> None:
    """It is no reason to fail, and none to wait for ever."""
    assert retrying(clock, get(server((503, {"Retry-After": value}), (200, {})))) == "ok"
    assert clock.now_s <= 30


def test_nobody_waits_past_the_deadline_because_a_server_says_so(
    server: Callable[..., str], clock: Clock
) -> None:
    """An hour is asked for, two minutes are there."""
    with pytest.raises(RetryLaterError):
        retrying(clock, get(server((429, {"Retry-After": "3600"}))), deadline_s=120.0)

    assert clock.now_s == pytest.approx(120.0)


def test_pauses_grow_and_are_random_over_their_length(clock: Clock) -> None:
    """Each is somewhere below 0.5, 1, 2, 4, ... and at most 30 s; no two runs are the same."""

    def fails() -> None:
        raise ConnectionResetError

    with pytest.raises(RetryLaterError):
        retrying(clock, fails, deadline_s=600.0)

    limits = [min(30.0, 0.5 * 2**number) for number in range(len(clock.pauses_s))]
    assert all(pause <= limit for pause, limit in zip(clock.pauses_s, limits, strict=True))
    assert len(set(clock.pauses_s)) > len(clock.pauses_s) // 2
    assert max(clock.pauses_s) > 8
    other = Clock()
    with pytest.raises(RetryLaterError):
        retrying(other, fails, deadline_s=600.0)
    assert other.pauses_s != clock.pauses_s


def test_the_time_that_a_slow_success_takes_is_not_counted(clock: Clock) -> None:
    """A part of an upload that fails after ten minutes still gets its two."""
    attempts = []

    def slow() -> str:
        attempts.append(clock())
        clock.now_s += 600
        if len(attempts) < 2:
            raise ConnectionResetError
        return "ok"

    assert retrying(clock, slow, deadline_s=120.0) == "ok"


def test_our_own_errors_go_through_at_once(clock: Clock) -> None:
    """A wrong digest is wrong the second time, too."""

    def fails() -> None:
        raise DigestError("other bytes")

    with pytest.raises(DigestError):
        retrying(clock, fails)
    assert clock.pauses_s == []


def test_a_slip_of_ours_is_no_failure_of_the_network(clock: Clock) -> None:
    """It comes out as it is, not as a registry that cannot be reached."""
    nothing: dict[str, str] = {}
    with pytest.raises(KeyError):
        retrying(clock, lambda: nothing["x"])
    assert clock.pauses_s == []


def test_failures_of_botocore_are_read() -> None:
    """Its errors hold the answer as a dictionary."""
    answer: Any = {
        "Error": {"Code": "SlowDown", "Message": "Reduce your rate"},
        "ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "3"}},
    }

    found = transfer.failure_of(botocore.exceptions.ClientError(answer, "PutObject"))

    assert found is not None
    assert (found.status, found.passing, found.retry_after_s) == (503, True, 3.0)
    gone = botocore.exceptions.EndpointConnectionError(endpoint_url="http://x")
    unreached = transfer.failure_of(gone)
    assert unreached is not None
    assert unreached.passing


def test_a_certificate_that_nobody_vouches_for_is_no_reason_to_wait() -> None:
    """Waiting makes nobody trust it."""
    import ssl  # noqa: PLC0415 - only here

    error = requests.exceptions.SSLError("bad handshake")
    error.__cause__ = ssl.SSLCertVerificationError(1, "self-signed certificate")

    found = transfer.failure_of(error)

    assert found is not None
    assert not found.passing


def test_what_a_server_says_is_cleaned_before_it_is_shown(clock: Clock) -> None:
    """An answer cannot give commands to the runner that reads the log."""

    def fails() -> None:
        answer = requests.Response()
        answer.status_code = 400
        raise requests.HTTPError("\x1b[31m::set-output name=x::y\n##[error]z", response=answer)

    with pytest.raises(StoreError) as caught:
        retrying(clock, fails)

    assert not re.search(r"::|##\[|\x1b|\n", caught.value.message)


# --- progress ---------------------------------------------------------------------------------


def test_progress_tells_share_rate_and_rest_over_all_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of 30 MiB at 10 MiB/s: after four seconds two thirds are done."""
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr("pipelines.console._SECONDS_BETWEEN_PLAIN_LINES", 0.0)

    with transfer.Progress("publish tiny-llama", 60 << 20, clock=clock) as progress:
        for name in ("a.gguf", "b.gguf"):
            on_bytes = progress.of(name, 30 << 20)
            for done in range(1, 4):
                clock.now_s += 1.0
                on_bytes(done * 10 << 20)

    lines = capsys.readouterr().err.splitlines()
    told = next(line for line in lines if "67 %" in line)
    assert "40 of 60 MiB" in told
    assert "10.0 MiB/s" in told
    assert "about 2 s left" in told
    assert "b.gguf" in told
    assert progress.rate_bytes_s == pytest.approx(10 << 20)


def test_progress_never_goes_beyond_the_size_of_a_file() -> None:
    """A part that is sent twice is not counted twice."""
    clock = Clock()
    progress = transfer.Progress("x", 10, clock=clock)
    on_bytes = progress.of("a", 10)
    clock.now_s = 1.0
    on_bytes(25)

    assert progress.rate_bytes_s == pytest.approx(10)
