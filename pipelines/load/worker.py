"""
The generator's own process: `python -m pipelines.load.worker PLAN OUT`.

It does nothing but send, read and take the time, so that no other work of ours delays a stamp: each
virtual user is a thread with one kept connection, each read from the socket is stamped as it comes,
and the bytes are put aside. They are understood after the run (`pipelines.load.dialects`). A thread
that waits for bytes does not hold Python's lock; measured against a null server
(`pipelines.load.calibration`) that keeps up with some tens of streams.

stdout tells the number of requests that have ended, one line a second. OUT is written at the end,
whole or not at all: a line about the run, then one for each answer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import http.client
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, ReadTimeoutError

from pipelines import atomic
from pipelines.load import access, dialects, plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.load.dialects import Answer, Exchange
    from pipelines.load.plan import Plan, Target

_READ_BYTES: Final = 1 << 16
_REFUSAL_BYTES: Final = 1 << 14
_TOLD_EVERY_S: Final = 1.0
_MOST_THREADS: Final = 2000
_STACK_BYTES: Final = 512 << 10
_OTHER_FILES: Final = 64
# A server may close a kept connection in the moment in which we send on it. It then fails at once;
# what fails later was read by the server and must not be sent again.
_STALE_WITHIN_NS: Final = 100_000_000
_NS: Final = 1_000_000_000
# Before the first request, so that all threads are there.
_START_IN_NS: Final = 20_000_000
# Reading what lies ready takes some microseconds, waking up for new bytes some tens.
_TOGETHER_NS: Final = 20_000
_COLON: Final = ord(":")
_LENGTH: Final = struct.Struct("<Q")

_now = time.monotonic_ns


def main(argv: list[str]) -> None:
    """Send the plan in the first file, write what came of it to the second."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(130))
    planned, target = plan.load(Path(argv[0]))
    threading.stack_size(_STACK_BYTES)
    most_threads = _allow_files()
    with tempfile.TemporaryFile(dir=Path(argv[1]).parent) as file:
        spool = _Spool(file)
        facts = _send_all(planned, target, spool, most_threads)
        _write(Path(argv[1]), planned, target, spool, facts)
    # Threads that still wait for a server that says nothing must not keep us.
    sys.stdout.flush()
    os._exit(0)


def _allow_files() -> int:
    """Allow as many open files as we may have; return the number of connections that leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_THREADS + _OTHER_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(_MOST_THREADS, soft - _OTHER_FILES))


# --- one virtual user -------------------------------------------------------------------------


class _OneWrite(http.client.HTTPConnection):
    """
    Writes head and body of a request together, as clients in other languages do.

    http.client writes them one after the other, and each write hands Python's lock to the threads
    that wait for it: where several send at once, each body waits for all the heads.
    """

    _held = b""
    _holds = False

    def endheaders(self, message_body: Any = None, *, encode_chunked: bool = False) -> None:  # noqa: ANN401
        self._holds = True
        super().endheaders(message_body, encode_chunked=encode_chunked)

    def send(self, data: Any) -> None:  # noqa: ANN401 - bytes here, whatever http.client allows
        if self._holds:
            self._held, self._holds = data, False
            return
        data, self._held = self._held + data, b""
        super().send(data)


class _Connection(_OneWrite, HTTPConnection):
    """Plain."""


class _TlsConnection(_OneWrite, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    """Connections that write once."""

    ConnectionCls = _Connection


class _TlsPool(HTTPSConnectionPool):
    """The same over TLS."""

    ConnectionCls = _TlsConnection


class _User:
    """One kept connection and the requests over it."""

    def __init__(self, target: Target) -> None:
        self._target = target
        headers = access.headers() | {"Content-Type": "application/json"}
        session = requests.Session()
        session.trust_env = False
        url = target.url.rstrip("/") + dialects.path(target.api, target.task)
        self._form = session.prepare_request(requests.Request("POST", url, headers=headers))
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1)
        self._adapter.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        self._verify = access.certificates()
        self._most_bytes = dialects.most_bytes(target)
        self._kept = False

    def prepare(self, prompt: plan.Prompt) -> requests.PreparedRequest:
        """Compose a request, before its time comes; all but its body is the same every time."""
        request = self._form.copy()
        request.body = json.dumps(dialects.body(self._target, prompt)).encode()
        request.headers["Content-Length"] = str(len(request.body))
        return request

    def send(self, request: requests.PreparedRequest, exchange: Exchange) -> None:
        """Send a request and read its answer to the end, or until it fails."""
        exchange.sent_ns = _now()
        try:
            response = self._answered(request, exchange)
        except requests.exceptions.ReadTimeout:
            self._fail(exchange, "timeout", f"no answer in {self._target.timeout_s:g} s")
            return
        except (requests.exceptions.RequestException, HTTPError, OSError, ValueError) as error:
            self._fail(exchange, "connect", _reason(error))
            return
        exchange.status = response.status_code
        try:
            self._read(response, exchange)
        except ReadTimeoutError:
            self._fail(exchange, "timeout", f"silent for {self._target.timeout_s:g} s")
        except (HTTPError, OSError, ValueError) as error:
            self._fail(exchange, "truncated_stream", f"the connection ended: {_reason(error)}")
        finally:
            exchange.end_ns = _now()
            self._kept = exchange.failure is None
            if exchange.failure is None:
                response.raw.release_conn()
            else:
                response.raw.close()

    def _answered(self, request: requests.PreparedRequest, exchange: Exchange) -> requests.Response:
        """Send; once more on a new connection if the kept one turns out to be closed."""
        try:
            return self._post(request)
        except requests.exceptions.ConnectionError as error:
            timed_out = isinstance(error, requests.exceptions.Timeout)
            late = _now() - exchange.sent_ns > _STALE_WITHIN_NS
            if timed_out or late or not self._kept:
                raise
        exchange.resent = True
        return self._post(request)

    def _post(self, request: requests.PreparedRequest) -> requests.Response:
        # Not through the session: its cookies, hooks and redirects cost more than all the rest.
        return self._adapter.send(
            request,
            stream=True,
            timeout=self._target.timeout_s,
            verify=self._verify,
        )

    def _read(self, response: requests.Response, exchange: Exchange) -> None:
        """
        Stamp every read: `read1` returns what one `recv` brought, no line or block is waited for.

        Source: http.client.HTTPResponse.read1, io.BufferedReader.read1.
        """
        read = response.raw.read1
        stamps, sizes = exchange.stamps, exchange.sizes
        parts: list[bytes] = []
        most = self._most_bytes if response.ok else _REFUSAL_BYTES
        silent_ns = int(self._target.timeout_s * _NS)
        total, last = 0, _now()
        try:
            while data := read(_READ_BYTES):
                stamp = _now()
                stamps.append(stamp)
                sizes.append(len(data))
                parts.append(data)
                total += len(data)
                if data[0] != _COLON:
                    last = stamp
                elif stamp - last > silent_ns:
                    # Comments that keep a connection open are no word about the answer.
                    self._fail(exchange, "timeout", "nothing but comments to keep it open")
                    return
                if total > most:
                    self._fail(exchange, "malformed", f"more than {most:,} bytes")
                    return
        finally:
            exchange.body = b"".join(parts)

    def _fail(self, exchange: Exchange, kind: Any, detail: str) -> None:  # noqa: ANN401
        exchange.failure = kind
        exchange.detail = detail
        exchange.end_ns = _now()
        self._kept = False


def _reason(error: BaseException) -> str:
    """Say what the lowest of nested errors says; the upper ones name objects of Python."""
    seen: set[int] = set()
    lowest = error
    while id(lowest) not in seen:
        seen.add(id(lowest))
        inner = [*lowest.args, getattr(lowest, "reason", None), lowest.__cause__]
        lowest = next((each for each in inner if isinstance(each, BaseException)), lowest)
    if isinstance(lowest, OSError) and lowest.strerror:
        return lowest.strerror
    return str(lowest) or type(lowest).__name__


# --- all of them ------------------------------------------------------------------------------


class _Spool:
    """Exchanges that have ended, on disk: a run of hours does not fill the memory."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401 - a temporary file has no nameable type
        self._file = file
        self._lock = threading.Lock()
        self._flying: dict[int, Exchange] = {}
        self._closed = False
        self.ended_count = 0

    def begin(self, exchange: Exchange) -> None:
        with self._lock:
            self._flying[id(exchange)] = exchange

    def end(self, exchange: Exchange) -> None:
        """Keep an exchange, unless it was given up."""
        data = pickle.dumps(exchange, pickle.HIGHEST_PROTOCOL)
        with self._lock:
            if self._flying.pop(id(exchange), None) is not None:
                self._keep(data)

    def give_up(self, detail: str) -> None:
        """Count what is still in flight as timed out."""
        with self._lock:
            for exchange in self._flying.values():
                given_up = dialects.Exchange(
                    index=exchange.index,
                    scheduled_ns=exchange.scheduled_ns,
                    sent_ns=exchange.sent_ns or _now(),
                    end_ns=_now(),
                    failure="timeout",
                    detail=detail,
                )
                self._keep(pickle.dumps(given_up, pickle.HIGHEST_PROTOCOL))
            self._flying.clear()

    def _keep(self, data: bytes) -> None:
        self._file.write(_LENGTH.pack(len(data)))
        self._file.write(data)
        self.ended_count += 1

    def __iter__(self) -> Iterator[Exchange]:
        self._file.seek(0)
        while head := self._file.read(_LENGTH.size):
            # Our own bytes of a moment ago, in a file without a name.
            yield pickle.loads(self._file.read(_LENGTH.unpack(head)[0]))  # noqa: S301


class _Users:
    """Connections that are free: those of the warm-up go on to the run."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._free: list[_User] = []

    def take(self) -> _User:
        with self._lock:
            return self._free.pop() if self._free else _User(self._target)

    def give(self, user: _User) -> None:
        with self._lock:
            self._free.append(user)


def _send_all(planned: Plan, target: Target, spool: _Spool, most_threads: int) -> dict[str, Any]:
    """Warm up, run, and tell what the run was."""
    users = _Users(target)
    warm_up = planned.warm_up_requests
    if warm_up:
        first = _Phase(planned, target, spool, users, range(warm_up), most_threads)
        first.run(first.repeat, min(planned.concurrency or warm_up, warm_up))
    gc.collect()
    gc.freeze()
    before_s = _cpu_s()
    counted = range(warm_up, len(planned.prompts))
    phase = _Phase(planned, target, spool, users, counted, most_threads)
    if planned.kind == "closed":
        phase.run(phase.repeat, planned.concurrency or 1)
    else:
        phase.run(phase.arrive, 2)
    ended_ns, after_s = _now(), _cpu_s()
    return {
        "started_ns": phase.start_ns,
        "ended_ns": ended_ns,
        "cpu_s": after_s - before_s,
        "unsent_count": phase.unsent_count,
        "threads_count": phase.threads_count,
        "late_threads_count": phase.late_threads_count,
    }


class _Phase:
    """Some prompts of a plan and the threads that send them."""

    def __init__(  # noqa: PLR0913, PLR0917 - what all threads share
        self,
        planned: Plan,
        target: Target,
        spool: _Spool,
        users: _Users,
        indices: range,
        most_threads: int,
    ) -> None:
        self._plan = planned
        self._target = target
        self._spool = spool
        self._users = users
        self._first, self._next, self._end = indices.start, indices.start, indices.stop
        self._most_threads = most_threads
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._idle = 0
        self._living = 0
        self._all_gone = threading.Event()
        self.start_ns = 0
        self._stop_ns = 0
        self.threads_count = 0
        self.late_threads_count = 0
        self.unsent_count = 0

    def run(self, work: Callable[[int], None], threads: int) -> None:
        """Let threads work and wait until all have ended, or had a run and a silence to do so."""
        self.start_ns = _now() + _START_IN_NS
        self._stop_ns = self.start_ns + int(self._plan.max_run_s * _NS)
        parent = os.getppid()
        give_up_ns = self._stop_ns + int(self._target.timeout_s * _NS)
        with self._lock:
            for number in range(threads):
                self._spawn(work, number)
        while not self._all_gone.wait(_TOLD_EVERY_S):
            sys.stdout.write(f"{self._spool.ended_count}\n")
            sys.stdout.flush()
            if os.getppid() != parent:
                # Where the kernel does not end us with our parent.
                os._exit(1)
            if _now() > give_up_ns:
                self._stop()
                self._spool.give_up("it had not ended when the run had")
                return

    def _stop(self) -> None:
        with self._lock:
            self.unsent_count += self._end - self._next
            self._next = self._end

    def _spawn(self, work: Callable[[int], None], number: int) -> None:
        self._living += 1
        self._idle += 1
        self.threads_count += 1
        threading.Thread(target=self._live, args=(work, number), daemon=True).start()

    def _live(self, work: Callable[[int], None], number: int) -> None:
        try:
            work(number)
        finally:
            with self._lock:
                self._living -= 1
                self._idle -= 1
                if not self._living:
                    self._all_gone.set()

    def _take(self) -> int | None:
        """Return the next prompt to be sent, None if the plan or its time is at an end."""
        with self._lock:
            if self._next >= self._end:
                return None
            self._next += 1
            return self._next - 1

    def repeat(self, number: int) -> None:
        """Be a virtual user of a closed run."""
        user = self._users.take()
        _sleep_until(self.start_ns + int(number * self._plan.ramp_s * _NS))
        while True:
            if _now() >= self._stop_ns:
                self._stop()
            index = self._take()
            if index is None:
                break
            request = user.prepare(self._plan.prompts[index])
            self._send(user, request, index)
        self._users.give(user)

    def arrive(self, _: int) -> None:
        """
        Wait for the turn, then for the next arrival; hand the turn on and send.

        One thread at a time has the turn. Before it sleeps it sees to it that another one waits
        behind it, so that no arrival waits for a thread to be made.
        """
        user = self._users.take()
        while True:
            with self._turn:
                index = self._take()
                if index is None:
                    return
                scheduled_ns = self.start_ns + int(self._plan.arrivals_s[index - self._first] * _NS)
                if scheduled_ns >= self._stop_ns or _now() >= self._stop_ns:
                    with self._lock:
                        self.unsent_count += 1
                    self._stop()
                    return
                self._see_to_a_follower()
                request = user.prepare(self._plan.prompts[index])
                _sleep_until(scheduled_ns)
            self._send(user, request, index, scheduled_ns)
            with self._lock:
                self._idle += 1

    def _see_to_a_follower(self) -> None:
        with self._lock:
            self._idle -= 1
            if self._idle:
                return
            if self._living < self._most_threads:
                self._spawn(self.arrive, 0)
            else:
                self.late_threads_count += 1

    def _send(
        self,
        user: _User,
        request: requests.PreparedRequest,
        index: int,
        scheduled_ns: int | None = None,
    ) -> None:
        """Send a request that was due at a time, or is now."""
        exchange = dialects.Exchange(index=index, scheduled_ns=scheduled_ns or _now())
        self._spool.begin(exchange)
        if scheduled_ns is None:
            exchange.scheduled_ns = _now()
        user.send(request, exchange)
        self._spool.end(exchange)


def _cpu_s() -> float:
    """Processor time that this process has had."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _sleep_until(at_ns: int) -> None:
    while (left := at_ns - _now()) > 0:
        time.sleep(left / _NS)


# --- after the run ----------------------------------------------------------------------------


def _write(out: Path, planned: Plan, target: Target, spool: _Spool, facts: dict[str, Any]) -> None:
    """Understand every answer and write the result; pauses between chunks are counted by length."""
    gaps: Counter[int] = Counter()
    before_s = _cpu_s()
    with atomic.replacing(out) as part, part.open("w", encoding="utf-8") as file:
        for exchange in spool:
            answer = dialects.read(exchange, target, planned.prompts[exchange.index])
            if exchange.index >= planned.warm_up_requests and answer.ok:
                gaps.update(_gaps_us(answer))
            if not planned.keep_stamps:
                answer = dataclasses.replace(answer, stamps_ns=(), texts=())
            file.write(json.dumps(dataclasses.asdict(answer)) + "\n")
        facts = facts | {"after_cpu_s": _cpu_s() - before_s}
        file.write(json.dumps({"run": facts, "gaps_us": gaps}) + "\n")


def _gaps_us(answer: Answer) -> Iterator[int]:
    """Pauses between chunks; what had come together is read within microseconds of each other."""
    before = None
    for stamp in answer.stamps_ns:
        if before is not None and stamp - before >= _TOGETHER_NS:
            yield round((stamp - before) / 1000)
        before = stamp


if __name__ == "__main__":
    main(sys.argv[1:])
