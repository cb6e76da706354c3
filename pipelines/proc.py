"""
The only place that starts programs.

A program gets an argv list, never a shell. Everything it prints goes, as it is, to a log file, and
cleaned to whoever listens. It dies with us: by its process group when we are told to stop, by
PR_SET_PDEATHSIG when we are killed (Linux). Interrupt, then terminate, then kill, within 3 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from shutil import which
from typing import IO, TYPE_CHECKING

from pipelines import console
from pipelines.errors import MachineError, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import psutil

TAIL_LINES = 12
STOP_WITHIN_S = 3.0
_PR_SET_PDEATHSIG = 1
# A tool that prints for ever must not fill our memory; the log on disk keeps everything.
_CAPTURE_LIMIT_BYTES = 64 << 20
_LINE_LIMIT_BYTES = 1 << 20
# What a program of ours answers to one line at most; more is a registry that has no end.
_LONGEST_ANSWER_BYTES = 256 << 20
# The mark by which `pipelines.orphans` finds what a killed run left, and what finds programs.
_ALWAYS_INHERITED = frozenset({"GGUF_FLEET_REPRO", "PATH"})

# Those that were not waited for to their end; Python complains of a child that is forgotten.
_watchdogs: list[subprocess.Popen[bytes]] = []

_libc = (
    ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True) if sys.platform == "linux" else None
)


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A program that has ended: what it printed and how long it took."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    wall_s: float
    max_rss_bytes: int


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def find(program: str) -> str:
    """
    Return the path of `program`.

    Raises:
        MachineError: It is not on PATH; the message says which PATH was searched.
    """
    path = which(program)
    if path is None:
        raise MachineError(
            f"{program} is not installed: none of {os.environ.get('PATH', '')} has it."
        )
    return path


def run(  # noqa: PLR0913 - each option is one independent fact about a child
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    inherit_env: bool = True,
    timeout_s: float | None = None,
    on_line: Callable[[str], None] | None = None,
    line_ends: bytes = b"\r\n",
    ok_codes: Sequence[int] = (0,),
    one_stream: bool = False,
) -> Completed:
    """
    Run a program to its end.

    Args:
        argv: Program and arguments; never passed through a shell.
        log: File to which the command, as one would type it, and all output are appended.
        cwd: Working directory of the program.
        env: Variables added to ours.
        inherit_env: False gives the program PATH and `env` alone: no token, no proxy of ours.
        timeout_s: Wall seconds after which the program is stopped.
        on_line: Called with each cleaned line of stdout and stderr as it appears; carriage
            returns count as line ends, since progress bars use them.
        line_ends: Bytes that end a line for `on_line`; llama.cpp separates the results of chunks
            by commas and ends the line only after the last.
        ok_codes: Exit codes that mean success.
        one_stream: Let the program write stderr into stdout, so that the order of lines is kept.

    Returns:
        Both streams as text (invalid UTF-8 replaced), wall time and peak resident memory of the
        largest process among those that ended below it.

    Raises:
        ToolError: Another exit code, a signal, or the time-out; carries the last lines and the log.
        MachineError: The program does not exist, or is none for this machine.
        Exception: Whatever `on_line` raised, after the program has ended.
    """
    words = [str(word) for word in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("ab", buffering=0) as log_file:
        where = f"cd {shlex.quote(str(cwd))} && " if cwd else ""
        _keep(log_file, f"+ {where}{shlex.join(words)}\n".encode())
        child = _start(words, cwd, _environment(env, inherit=inherit_env), one_stream=one_stream)
        readers = [
            _Reader(stream, log_file, on_line, line_ends)
            for stream in (child.stdout, child.stderr)
            if stream
        ]
        try:
            timed_out = not _wait(child, readers, timeout_s)
        except BaseException:
            stop(child)
            raise
    for reader in readers:
        if reader.failure is not None:
            raise reader.failure
    stdout, stderr = (*(reader.text() for reader in readers), "")[:2]
    done = Completed(
        argv=tuple(words),
        code=child.returncode,
        stdout=stdout,
        stderr=stderr,
        wall_s=time.monotonic() - started,
        max_rss_bytes=getattr(child, "max_rss_bytes", 0),
    )
    if timed_out or done.code not in ok_codes:
        raise _failure(done, log, timeout_s if timed_out else None)
    return done


def answer(
    argv: Sequence[str | Path],
    *,
    told: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    within_s: float,
) -> bytes:
    """
    Return, byte for byte, what a program answers to what it is told; no log keeps any of it.

    Args:
        argv: Program and arguments; never passed through a shell.
        told: Its stdin.
        cwd: Working directory of the program.
        env: Variables added to ours.
        within_s: Wall seconds after which the program is stopped.

    Raises:
        ToolError: Another exit code than 0, a signal, or the time-out.
        MachineError: The program does not exist, or is none for this machine.
    """
    words = [str(word) for word in argv]
    name = os.path.basename(words[0])  # noqa: PTH119 - a word of argv, not a path of ours
    child = _start(words, cwd, _environment(env, inherit=True), stdin=subprocess.PIPE)
    try:
        stdout, stderr = child.communicate(told, timeout=within_s)
    except subprocess.TimeoutExpired as error:
        stop(child)
        raise ToolError(f"{name} was stopped after {within_s:.0f} s.") from error
    except BaseException:
        stop(child)
        raise
    finally:
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
    if child.returncode:
        said = _last_lines(stderr.decode(errors="replace"), TAIL_LINES)
        raise ToolError(f"{name} {_cause(child.returncode)}.\n{said}".rstrip())
    return stdout


@contextmanager
def background(
    argv: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    inherit_env: bool = True,
) -> Iterator[Background]:
    """
    Run a server beside the block; it and its whole process group are gone when the block is left.

    What it prints goes to the log straight from the program: no thread of ours runs beside what is
    timed, and nothing stops when it prints more than somebody reads. It is ended as `stop` does,
    within 3 s. The kernel ends it when the thread that entered the block ends.

    Args:
        argv: Program and arguments; never passed through a shell.
        log: File to which the command, as one would type it, and all output are appended.
        cwd: Working directory of the program.
        env: Variables added to ours.
        inherit_env: False gives the program PATH and `env` alone: no token, no proxy of ours.

    Raises:
        MachineError: The program does not exist, or is none for this machine.
    """
    words = [str(word) for word in argv]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as log_file:
        where = f"cd {shlex.quote(str(cwd))} && " if cwd else ""
        _keep(log_file, f"+ {where}{shlex.join(words)}\n".encode())
        begin = log_file.tell()
        child = _start(words, cwd, _environment(env, inherit=inherit_env), output=log_file)
        try:
            yield Background(child, log, begin)
        finally:
            # One that was collected before has no number any more that would be safe to signal.
            if child.returncode is None:
                stop(child)
            _wait_for_group(child.pid)


class Background:
    """A program that runs beside us."""

    def __init__(self, child: _Child, log: Path, begin: int) -> None:
        """Take a program that was started; what it prints begins at byte `begin` of `log`."""
        self._child = child
        self._begin = begin
        self.log = log

    @property
    def pid(self) -> int:
        """Number of its process, and of its process group."""
        return self._child.pid

    def ended(self) -> str | None:
        """
        Say how it ended, as the end of a sentence that begins with its name; None: it runs.

        What it started and left behind ends with it.
        """
        if self._child.returncode is None and self._child.reap():
            _signal_group(self._child.pid, signal.SIGKILL)
        return None if self._child.returncode is None else _cause(self._child.returncode)

    @property
    def was_killed(self) -> bool:
        """Whether the kernel, for want of memory, or somebody else killed it: no act of its own."""
        return self.ended() is not None and self._child.returncode == -signal.SIGKILL

    def output(self) -> str:
        """Return the last mebibyte of what it printed so far, as it is."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._begin, size - _LINE_LIMIT_BYTES))
            return file.read().decode(errors="replace")
        return ""

    def last_lines(self, count: int = TAIL_LINES) -> str:
        """Return the last cleaned lines that it printed, indented."""
        return _last_lines(self.output(), count)


@contextmanager
def watched_by(
    argv: Sequence[str], *, word: bytes, env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """
    Run a watchdog beside the block: a program that reads its stdin, which only we hold open.

    It gets `word` when the block is left, in whichever way; it gets nothing but the end of the
    stream when we are killed. It has a session of its own, so that no signal meant for us ends it.

    Args:
        argv: The watchdog.
        word: What it is told; empty if it has to do its work in every case.
        env: All of its environment; ours if absent.
    """
    dog = subprocess.Popen(
        list(argv),
        env=None if env is None else dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        try:
            dog.communicate(word, timeout=STOP_WITHIN_S)
        except (OSError, subprocess.TimeoutExpired):
            # One that died before us is no reason to fail: the next run repairs what is left. One
            # that is slow, on a busy machine, ends by itself.
            _watchdogs.append(dog)


class Dialogue:
    """
    A program of ours that answers each line that it is told by one line, or by several.

    It has a process group of its own, so that a Ctrl-C does not tear what it is just doing. It ends
    by itself when its stdin does, which only we hold open: when we are killed, it ends after the
    question that it is at.
    """

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str]) -> None:
        """
        Start it.

        Args:
            argv: Program and arguments; never passed through a shell.
            env: Variables added to ours.

        Raises:
            MachineError: The program does not exist, or is none for this machine.
        """
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the program
        self._heard = bytearray()
        try:
            self._child = subprocess.Popen(
                list(argv),
                env=_environment(env, inherit=True),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                bufsize=0,
                process_group=0,
            )
            if self._child.stdin is not None:
                os.set_blocking(self._child.stdin.fileno(), False)
        except OSError as error:
            self._said.close()
            raise MachineError(f"{argv[0]} cannot be started: {error.strerror}.") from error

    def ask(self, line: str, *, within_s: float) -> str:
        """
        Tell it a line and return the one that it answers.

        Raises:
            ToolError: It has ended, ends, or does not answer in time; it is then gone.
            BaseException: We were interrupted; it is then gone too, for its answer would be taken
                for that to the next question.
        """
        deadline = time.monotonic() + within_s
        with self._gone_on_failure(within_s):
            self._tell(line, deadline)
            answer = self._hear(deadline)
            if answer is None:
                raise TimeoutError
            return answer

    def tell(self, line: str, *, within_s: float) -> None:
        """
        Tell it a line, to which it says as many as it likes; `hear` returns them.

        Raises:
            ToolError, BaseException: See `ask`.
        """
        with self._gone_on_failure(within_s):
            self._tell(line, time.monotonic() + within_s)

    def hear(self, *, within_s: float) -> str | None:
        """
        Return the next line that it says; None if it says none in time.

        Raises:
            ToolError: It has ended; what it said before was returned before.
            BaseException: See `ask`.
        """
        with self._gone_on_failure(within_s):
            return self._hear(time.monotonic() + within_s)

    @contextmanager
    def _gone_on_failure(self, within_s: float) -> Iterator[None]:
        """End the program when the block fails, and say how it ended."""
        try:
            yield
        except (BrokenPipeError, EOFError):
            raise self._error(_cause(self.close())) from None
        except TimeoutError:
            self.close()
            raise self._error(f"was stopped after {within_s:.0f} s") from None
        except BaseException:
            self.close()
            raise

    def _error(self, cause: str) -> ToolError:
        return ToolError(f"{self._name} {cause}.\n{self._last_words}".rstrip())

    def _tell(self, line: str, deadline: float) -> None:
        told = self._child.stdin
        if told is None or told.closed:
            raise EOFError
        rest = memoryview(line.encode() + b"\n")
        while rest:
            # A pipe takes 64 KiB from us; a program that hangs reads none of it.
            _, writable, _ = select.select([], [told], [], max(deadline - time.monotonic(), 0))
            if not writable:
                raise TimeoutError
            rest = rest[os.write(told.fileno(), rest) :]

    def _hear(self, deadline: float) -> str | None:
        answers = self._child.stdout
        if answers is None or answers.closed:
            raise EOFError
        searched = 0
        while (end := self._heard.find(b"\n", searched)) < 0:
            searched = len(self._heard)
            if searched > _LONGEST_ANSWER_BYTES:
                raise EOFError
            ready, _, _ = select.select([answers], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return None
            chunk = os.read(answers.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self._heard += chunk
        line = self._heard[:end].decode(errors="replace")
        del self._heard[: end + 1]
        return line

    @property
    def _name(self) -> str:
        return os.path.basename(str(self._child.args[0]))  # type: ignore[index]  # noqa: PTH119

    _last_words = ""

    def close(self) -> int:
        """End it, at the latest after half a second, and return its exit code."""
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()
        try:
            code = self._child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            _signal_group(self._child.pid, signal.SIGKILL)
            code = self._child.wait()
        if not self._said.closed:
            self._said.seek(max(self._said.seek(0, os.SEEK_END) - _LINE_LIMIT_BYTES, 0))
            self._last_words = _last_lines(self._said.read().decode(errors="replace"), TAIL_LINES)
            self._said.close()
        return code


class _Child(subprocess.Popen[bytes]):
    """Popen that also asks the kernel for the peak memory of the child it reaps."""

    max_rss_bytes = 0

    def reap(self) -> bool:
        """Collect the child if it has ended, with its resource usage."""
        if self.returncode is not None:
            return True
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid == 0:
            return False
        self.returncode = os.waitstatus_to_exitcode(status)
        # Linux counts ru_maxrss in KiB, macOS in bytes (getrusage(2) of each).
        self.max_rss_bytes = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return True


def _environment(added: Mapping[str, str] | None, *, inherit: bool) -> dict[str, str]:
    """Compose what a child sees; the mark of the run goes everywhere, or a kill would miss it."""
    kept = {key: value for key, value in os.environ.items() if inherit or key in _ALWAYS_INHERITED}
    return kept | dict(added or {})


def _start(  # noqa: PLR0913 - each option is one independent fact about a child
    words: list[str],
    cwd: Path | None,
    env: Mapping[str, str],
    *,
    one_stream: bool = False,
    output: IO[bytes] | None = None,
    stdin: int = subprocess.DEVNULL,
) -> _Child:
    """Start a program; what it prints goes into pipes, or both streams into the file `output`."""
    try:
        return _Child(
            words,
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT if one_stream or output else subprocess.PIPE,
            process_group=0,
            # It calls prctl and nothing else: Python warns of hooks where there are threads.
            preexec_fn=die_with_parent if _libc is not None else None,
        )
    except OSError as error:
        raise MachineError(f"{words[0]} cannot be started: {error.strerror}.") from error


def _keep(log_file: IO[bytes], chunk: bytes) -> None:
    """Append to the log; a full disk must not leave a pipe unread, the child would hang."""
    with contextlib.suppress(OSError):
        log_file.write(chunk)


class _Reader:
    """Copies one stream of a child to the log, to memory and, line by line, to a listener."""

    def __init__(
        self,
        stream: IO[bytes],
        log_file: IO[bytes],
        on_line: Callable[[str], None] | None,
        line_ends: bytes,
    ) -> None:
        self._stream = stream
        self._log_file = log_file
        self._on_line = on_line
        self._line_ends = re.compile(b"[" + re.escape(line_ends) + b"]")
        self._kept = bytearray()
        self._rest = b""
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._copy, daemon=True)
        self.thread.start()

    def _copy(self) -> None:
        while chunk := os.read(self._stream.fileno(), 1 << 16):
            _keep(self._log_file, chunk)
            if len(self._kept) < _CAPTURE_LIMIT_BYTES:
                self._kept += chunk
            if self._on_line is not None:
                self._split(chunk)
        self._tell(self._rest)
        self._stream.close()

    def _split(self, chunk: bytes) -> None:
        *lines, rest = self._line_ends.split(self._rest + chunk)
        self._rest = rest[-_LINE_LIMIT_BYTES:]
        for line in lines:
            self._tell(line)

    def _tell(self, line: bytes) -> None:
        """Hand a line to the listener; one that fails is heard of later, for the pipe must flow."""
        if self._on_line is None or not line.strip():
            return
        try:
            self._on_line(console.clean(line.decode(errors="replace")))
        except Exception as error:  # noqa: BLE001 - raised again by `run`
            self.failure, self._on_line = error, None

    def text(self) -> str:
        return self._kept.decode(errors="replace")


def _wait(child: _Child, readers: list[_Reader], timeout_s: float | None) -> bool:
    """Wait for the end; False means that the time-out struck and the child was stopped."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pause_s = 0.001
    while not child.reap():
        if deadline is not None and time.monotonic() > deadline:
            stop(child)
            return False
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, 0.05)
    # What the child itself left running keeps the pipes open; it has no business to.
    _signal_group(child.pid, signal.SIGKILL)
    for reader in readers:
        reader.thread.join(timeout=STOP_WITHIN_S)
    return True


def _signal_group(pgid: int, number: int) -> None:
    try:
        os.killpg(pgid, number)
    except (ProcessLookupError, PermissionError):
        return


def stop(child: _Child) -> None:
    """End a child and its whole process group: interrupt, terminate, kill, within 3 s."""
    for number, wait_s in ((signal.SIGINT, 1.0), (signal.SIGTERM, 1.0), (signal.SIGKILL, 1.0)):
        _signal_group(child.pid, number)
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            if child.reap():
                _signal_group(child.pid, signal.SIGKILL)
                return
            time.sleep(0.02)


def _wait_for_group(pgid: int) -> None:
    """
    Wait until what a group left behind has given back its memory and its ports.

    It was sent SIGKILL; a process of many GB takes a moment to go. One that has ended and that
    nobody collects, as in a container whose first process does not, holds neither.
    """
    import psutil  # noqa: PLC0415 - only after a background program

    deadline = time.monotonic() + STOP_WITHIN_S
    while time.monotonic() < deadline:
        try:
            os.killpg(pgid, 0)
        except (ProcessLookupError, PermissionError):
            return
        if not any(_is_in_group(process, pgid) for process in psutil.process_iter()):
            return
        time.sleep(0.02)


def _is_in_group(process: psutil.Process, pgid: int) -> bool:
    """Tell whether a living process belongs to a group; it may end while we ask."""
    try:
        return os.getpgid(process.pid) == pgid and process.status() != "zombie"
    except Exception:  # noqa: BLE001 - psutil.Error or OSError: it is gone
        return False


def _cause(code: int) -> str:
    """Say what an exit code means."""
    if code == -signal.SIGKILL:
        return "was killed by the kernel or by somebody: often there was too little memory"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _failure(done: Completed, log: Path, timeout_s: float | None) -> ToolError:
    program = os.path.basename(done.argv[0])  # noqa: PTH119 - a word of argv, not a path of ours
    cause = _cause(done.code) if timeout_s is None else f"was stopped after {timeout_s:.0f} s"
    return ToolError(f"{program} {cause}.\n{tail(done)}".rstrip(), log=log)


def tail(done: Completed) -> str:
    """Return the last cleaned lines that a program printed, stderr first, indented."""
    return _last_lines(done.stderr if done.stderr.strip() else done.stdout, TAIL_LINES)


def _last_lines(text: str, count: int) -> str:
    lines = [console.clean(line)[:300] for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])
