"""Programs are started, heard and ended in one place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from pipelines import proc
from pipelines.errors import MachineError, ToolError


def test_output_is_returned_and_kept_in_the_log(tmp_path: Path) -> None:
    """Both streams come back apart, and the log holds argv and all of it."""
    log = tmp_path / "a.log"

    done = proc.run(["sh", "-c", "echo one; echo two >&2"], log=log)

    assert (done.stdout, done.stderr, done.code) == ("one\n", "two\n", 0)
    text = log.read_text()
    assert text.startswith("+ sh -c 'echo one; echo two >&2'\n")
    assert "one\n" in text
    assert "two\n" in text


def test_an_argument_is_never_a_shell_word(tmp_path: Path) -> None:
    """Hostile text arrives as one argument and runs nothing."""
    hostile = "x; touch PWNED #$(touch PWNED)`touch PWNED`"

    done = proc.run(["printf", "%s", hostile], log=tmp_path / "a.log", cwd=tmp_path)

    assert done.stdout == hostile
    assert not (tmp_path / "PWNED").exists()


def test_a_failure_shows_the_last_lines_and_the_log(tmp_path: Path) -> None:
    """An exit code other than success says which, with the program's own last words."""
    log = tmp_path / "a.log"

    with pytest.raises(ToolError, match=r"exit code 3\.\n    disk is on fire") as info:
        proc.run(["sh", "-c", "echo disk is on fire >&2; exit 3"], log=log)

    assert info.value.log == log


def test_runner_commands_in_output_are_defused(tmp_path: Path) -> None:
    """What a tool prints cannot set outputs or annotations of a GitHub Actions step."""
    heard: list[str] = []
    script = "printf '::error::x\\nllama ##[set-output name=a]b\\r\\033[31mred\\033[0m\\n'; exit 1"

    with pytest.raises(ToolError) as info:
        proc.run(["sh", "-c", script], log=tmp_path / "a.log", on_line=heard.append)

    for text in (*heard, info.value.message):
        assert "::" not in text
        assert "##[" not in text
        assert "\x1b" not in text


def test_a_killed_tool_is_named_as_killed(tmp_path: Path) -> None:
    """SIGKILL is reported with its usual cause, too little memory."""
    with pytest.raises(ToolError, match="too little memory"):
        proc.run(["sh", "-c", "kill -9 $$"], log=tmp_path / "a.log")


def test_a_tool_that_aborts_is_named_by_its_signal(tmp_path: Path) -> None:
    """A failed assertion in llama.cpp shows as SIGABRT."""
    with pytest.raises(ToolError, match="died of SIGABRT"):
        proc.run(["sh", "-c", "kill -ABRT $$"], log=tmp_path / "a.log")


def test_a_missing_program_names_itself() -> None:
    """The error for a program that is not installed says which and where was searched."""
    with pytest.raises(MachineError, match="no-such-program is not installed"):
        proc.find("no-such-program")


def test_a_timeout_ends_the_whole_family(tmp_path: Path) -> None:
    """After the time-out neither the program nor its children run on."""
    pid_file = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid_file}; wait"

    with pytest.raises(ToolError, match="was stopped after 1 s"):
        proc.run(["sh", "-c", script], log=tmp_path / "a.log", timeout_s=1)

    assert _is_gone(int(pid_file.read_text()))


def test_a_child_left_behind_does_not_block(tmp_path: Path) -> None:
    """A tool that leaves a background process with our pipes open does not hang us."""
    started = time.monotonic()

    proc.run(["sh", "-c", "sleep 600 & true"], log=tmp_path / "a.log")

    assert time.monotonic() - started < 60


def test_a_listener_that_fails_does_not_hang_the_tool(tmp_path: Path) -> None:
    """A bug in what shows progress is raised, and the tool's output is still read to its end."""
    heard: list[str] = []

    def fail(line: str) -> None:
        heard.append(line)
        raise KeyError(line[:1])

    with pytest.raises(KeyError, match="y"):
        proc.run(
            ["sh", "-c", "yes | head -c 1000000"],
            log=tmp_path / "a.log",
            on_line=fail,
            timeout_s=60,
        )

    assert heard == ["y"]
    assert (tmp_path / "a.log").stat().st_size > 1_000_000


def test_a_program_for_another_machine_is_named(tmp_path: Path) -> None:
    """A file that no kernel can execute is an error in words, not a traceback."""
    program = tmp_path / "llama-quantize"
    program.write_bytes(b"\x7fELF but not really")
    program.chmod(0o755)

    with pytest.raises(MachineError, match="llama-quantize cannot be started"):
        proc.run([program], log=tmp_path / "a.log")


def test_a_full_log_disk_does_not_hang_the_tool(tmp_path: Path) -> None:
    """When the log cannot be written, the tool's output is still read to its end."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = tmp_path / "full.log"
    log.symlink_to("/dev/full")

    done = proc.run(["sh", "-c", "head -c 1000000 /dev/zero"], log=log)

    assert len(done.stdout) == 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_tool_dies_when_we_are_killed(tmp_path: Path) -> None:
    """After kill -9 of our process no tool runs on."""
    pid_file = tmp_path / "pid"
    code = textwrap.dedent(f"""
        from pathlib import Path
        from pipelines import proc
        proc.run(["sh", "-c", "echo $$ > {pid_file}; exec sleep 600"], log=Path("{tmp_path}/a.log"))
    """)
    root = Path(__file__).resolve().parent.parent
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    while not (pid_file.exists() and pid_file.read_text().strip()):
        time.sleep(0.02)

    os.kill(ours.pid, signal.SIGKILL)
    ours.wait()

    assert _is_gone(int(pid_file.read_text()))


def _is_gone(pid: int) -> bool:
    """Wait up to 5 s for a process to end; a zombie has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("left_by", ["return", "error", "interrupt"])
def test_a_server_and_its_children_are_gone_when_the_block_is_left(
    tmp_path: Path, left_by: str
) -> None:
    """However the block ends, nothing that the server started runs on."""
    pid_file = tmp_path / "pid"
    script = f"trap '' INT; sleep 600 & echo $! > {pid_file}; wait"
    errors = {"error": ValueError, "interrupt": KeyboardInterrupt}

    def use() -> int:
        with proc.background(["sh", "-c", script], log=tmp_path / "a.log") as server:
            _wait_for_text(pid_file)
            assert server.ended() is None
            if left_by in errors:
                raise errors[left_by]
            return server.pid

    if left_by == "return":
        assert _is_gone(use())
    else:
        with pytest.raises(errors[left_by]):
            use()

    assert _is_gone(int(pid_file.read_text()))


def test_a_server_that_ends_by_itself_takes_its_children_along(tmp_path: Path) -> None:
    """A crash of the server is told with its exit code and last words, and leaves no orphan."""
    pid_file = tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid_file}; echo out of luck >&2; exit 7"

    with proc.background(["sh", "-c", script], log=tmp_path / "a.log") as server:
        deadline = time.monotonic() + 30
        while (how := server.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.01)

        assert how == "ended with exit code 7"
        assert server.last_lines() == "    out of luck"
        assert _is_gone(int(pid_file.read_text()))


def test_only_its_own_output_is_shown_of_a_server(tmp_path: Path) -> None:
    """The log keeps what was there before; what a server printed begins behind it."""
    log = tmp_path / "a.log"
    log.write_text("of another run\n")

    with proc.background(["sh", "-c", "echo up; sleep 600"], log=log) as server:
        deadline = time.monotonic() + 30
        while server.output() != "up\n" and time.monotonic() < deadline:
            time.sleep(0.01)

        assert server.output() == "up\n"
    assert log.read_text() == "of another run\n+ sh -c 'echo up; sleep 600'\nup\n"


def test_a_server_sees_only_the_environment_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token of ours reaches a server that reads a stranger's model."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    log = tmp_path / "a.log"

    with proc.background(
        ["sh", "-c", "env; echo end"], log=log, env={"A": "1"}, inherit_env=False
    ) as server:
        deadline = time.monotonic() + 30
        while "end" not in server.output() and time.monotonic() < deadline:
            time.sleep(0.01)

        assert "\nA=1\n" in "\n" + server.output()
        assert "HF_TOKEN" not in server.output()


def _wait_for_text(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.01)


# --- a program that is asked ------------------------------------------------------------------

TWICE = "import sys\nfor line in sys.stdin:\n    print(line.strip() * 2, flush=True)"


def test_each_line_that_a_program_is_told_gets_one_answer() -> None:
    """Also one that is larger than a pipe; and it is gone when nobody asks it any more."""
    dialogue = proc.Dialogue([sys.executable, "-c", TWICE], env={})

    assert dialogue.ask("ab", within_s=30) == "abab"
    assert len(dialogue.ask("a" * 300_000, within_s=30)) == 600_000
    assert dialogue.close() == 0


def test_a_program_may_say_several_lines_to_one() -> None:
    """Each is returned by itself, in order; silence is no error, its end is one."""
    talker = "print('a', flush=True); print('b', flush=True); input(); print(input() + '!')"
    dialogue = proc.Dialogue([sys.executable, "-c", talker], env={})

    dialogue.tell("begin", within_s=30)
    assert [dialogue.hear(within_s=30), dialogue.hear(within_s=30)] == ["a", "b"]
    assert dialogue.hear(within_s=0.01) is None
    dialogue.tell("c", within_s=30)
    assert dialogue.hear(within_s=30) == "c!"
    with pytest.raises(ToolError, match="ended with exit code 0"):
        dialogue.hear(within_s=30)


def test_a_program_that_ends_in_a_dialogue_says_why_at_each_question() -> None:
    """Its last words are in the error; no answer is made up."""
    dialogue = proc.Dialogue([sys.executable, "-c", "raise SystemExit('no key')"], env={})

    for _ in range(2):
        with pytest.raises(ToolError, match=r"ended with exit code 1\.\n +no key"):
            dialogue.ask("question", within_s=30)


def test_a_program_that_never_answers_is_stopped() -> None:
    """Whoever asks next is not given the answer to the question before."""
    dialogue = proc.Dialogue(["sleep", "60"], env={})

    with pytest.raises(ToolError, match="was stopped after 1 s"):
        dialogue.ask("question", within_s=1)
    with pytest.raises(ToolError, match="was killed"):
        dialogue.ask("question", within_s=1)


def test_a_program_that_never_listens_is_stopped() -> None:
    """A question that is larger than a pipe waits no longer for it than a small one."""
    dialogue = proc.Dialogue(["sleep", "60"], env={})

    with pytest.raises(ToolError, match="was stopped after 1 s"):
        dialogue.ask("a" * 1_000_000, within_s=1)


def test_an_answer_without_an_end_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not collected until memory is full; the program is gone."""
    monkeypatch.setattr(proc, "_LONGEST_ANSWER_BYTES", 1 << 20)
    endless = ["sh", "-c", "head -c 3000000 /dev/zero; exec cat > /dev/null"]
    dialogue = proc.Dialogue(endless, env={})
    with pytest.raises(ToolError) as stopped:
        dialogue.ask("a", within_s=30)
    assert "after 30 s" not in stopped.value.message
    with pytest.raises(ToolError):
        dialogue.ask("a", within_s=1)
