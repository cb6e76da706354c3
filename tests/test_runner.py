"""What a GitHub Actions runner gives to a step and takes from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import runner
from pipelines.errors import FleetError, MachineError

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "1" * 40
BASE = "2" * 40


def read_outputs(text: str) -> dict[str, str]:
    """Parse a GITHUB_OUTPUT as actions/runner does (FileCommandManager.cs, ParseEnv...)."""
    found: dict[str, str] = {}
    lines = text.split("\n")
    assert lines.pop() == "", "the file ends with a line end"
    while lines:
        line = lines.pop(0)
        if not line:
            continue
        equals, heredoc = line.find("="), line.find("<<")
        if heredoc >= 0 and (equals < 0 or heredoc < equals):
            name, _, frame = line.partition("<<")
            value = []
            while lines[0] != frame:
                value.append(lines.pop(0))
            lines.pop(0)
            found[name] = "\n".join(value)
        else:
            name, _, found[name] = line.partition("=")
    return found


@pytest.fixture
def actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a step; its files are below the path that is returned."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    monkeypatch.setenv("GITHUB_EVENT_PATH", str(tmp_path / "event.json"))
    monkeypatch.delenv("GITHUB_SHA", raising=False)
    return tmp_path


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.one_of(st.sampled_from("\n<=fleet-"), st.characters(codec="utf-8"))))
def test_whatever_a_value_holds_it_becomes_no_other_output(actions: Path, value: str) -> None:
    """Line ends, `name=value` and `name<<X` inside a value stay inside it."""
    (actions / "output").unlink(missing_ok=True)

    runner.outputs(first=value, second="x")

    told = read_outputs((actions / "output").read_bytes().decode())
    assert told == {"first": value, "second": "x"}


def test_outputs_are_added_to_those_that_are_there_and_spelled_as_expressions_are(
    actions: Path,
) -> None:
    """A second call takes nothing back; true is `true`."""
    runner.outputs(any=True, none=False, count=3)
    runner.outputs(models="a b")

    told = read_outputs((actions / "output").read_text())
    assert told == {"any": "true", "none": "false", "count": "3", "models": "a b"}


def test_an_output_above_githubs_limit_or_with_a_name_that_is_none_is_an_error(
    actions: Path,
) -> None:
    """GitHub would fail the job with a sentence about a template; nothing is written."""
    with pytest.raises(FleetError, match="larger than the 1 MiB"):
        runner.outputs(matrix="x" * (runner.OUTPUT_LIMIT_BYTES // 2))
    with pytest.raises(FleetError, match="no name"):
        runner.outputs(**{"a=b": "c"})

    assert not (actions / "output").exists()


def test_a_summary_that_is_too_long_is_cut_at_a_line_and_says_so_first(
    actions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GitHub drops a summary above 1 MiB whole; its beginning is worth more."""
    runner.summary("## First\n")
    runner.summary("".join(f"line {number} ü\n" for number in range(100_000)))
    runner.summary("no room left")

    data = (actions / "summary").read_bytes()
    lines = data.decode().splitlines()
    assert runner.SUMMARY_LIMIT_BYTES - 100 < len(data) <= runner.SUMMARY_LIMIT_BYTES
    assert lines[0] == "## First"
    assert lines[1].startswith("> This summary was too long for GitHub")
    assert lines[-1].startswith("line ")
    assert lines[-1].endswith("ü")
    assert "longer than GitHub shows" in capsys.readouterr().err


def test_outside_actions_nothing_is_written_and_there_is_no_event(
    actions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person who has such variables from somewhere is not taken for a runner."""
    write_event(actions, {"action": "opened"})
    monkeypatch.setenv("GITHUB_EVENT_NAME", "push")
    monkeypatch.setenv("GITHUB_SHA", HEAD)
    monkeypatch.delenv("GITHUB_ACTIONS")

    runner.outputs(models="a")
    runner.summary("## x")
    runner.mask("secret")

    assert [path.name for path in actions.iterdir()] == ["event.json"]
    assert (runner.event(), runner.event_name(), runner.head()) == ({}, "", None)
    assert (runner.base(), runner.repository(), runner.run_url()) == (None, None, None)
    assert capsys.readouterr().err == ""


def write_event(actions: Path, payload: object) -> None:
    """Put the payload where the runner does."""
    (actions / "event.json").write_text(json.dumps(payload))


def pull_request(**changes: object) -> dict[str, object]:
    """Return what an event says of a pull request."""
    return {
        "number": 7,
        "head": {"ref": "b", "sha": HEAD, "repo": {"full_name": "o/r"}},
        "base": {"ref": "main", "sha": BASE, "repo": {"full_name": "o/r"}},
        "labels": [{"name": "over-budget"}],
        **changes,
    }


def test_a_pull_request_has_its_ends_its_labels_and_its_repository(actions: Path) -> None:
    """The head is that of the branch, never the merge that GITHUB_SHA names."""
    write_event(actions, {"pull_request": pull_request()})

    request = runner.pull_request()

    assert request is not None
    assert (request.number, request.labels, request.is_from_fork) == (7, ("over-budget",), False)
    assert (runner.head(), runner.base()) == (HEAD, BASE)


@pytest.mark.parametrize("repo", [None, {"full_name": "stranger/r"}])
def test_a_branch_of_another_or_of_no_repository_is_from_a_fork(
    actions: Path, repo: object
) -> None:
    """GitHub sends null where the fork was deleted; that must not pass as ours."""
    write_event(actions, {"pull_request": pull_request(head={"ref": "b", "sha": HEAD,
                                                             "repo": repo})})  # fmt: skip

    request = runner.pull_request()

    assert request is not None
    assert request.is_from_fork


@pytest.mark.parametrize(
    "changes",
    [{"number": "7"}, {"number": True}, {"head": None}, {"head": {"sha": "main", "ref": "b"}},
     {"base": {"sha": BASE, "ref": "main", "repo": {"full_name": "a/../b"}}}, {"labels": [3]}],
)  # fmt: skip
def test_an_event_that_is_no_pull_request_as_github_sends_them_is_an_error(
    actions: Path, changes: dict[str, object]
) -> None:
    """What is not understood decides nothing."""
    write_event(actions, {"pull_request": pull_request(**changes)})

    with pytest.raises(MachineError, match="no pull request as GitHub sends them"):
        runner.pull_request()


@pytest.mark.parametrize(
    ("payload", "head", "base"),
    [
        ({"merge_group": {"head_sha": HEAD, "base_sha": BASE}}, HEAD, BASE),
        ({"before": BASE, "after": HEAD}, HEAD, BASE),
        ({"before": "0" * 40, "after": HEAD}, HEAD, None),
        ({"inputs": {}}, "3" * 40, None),
    ],
)
def test_every_event_has_its_ends(
    actions: Path, payload: object, head: str, base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge group, a push, the first push of a branch, a dispatch."""
    monkeypatch.setenv("GITHUB_SHA", "3" * 40)
    write_event(actions, payload)

    assert (runner.head(), runner.base()) == (head, base)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\xff"])
def test_an_event_that_cannot_be_read_is_an_error(actions: Path, text: str) -> None:
    """Cut, of another shape, nested without end: one sentence that names the file."""
    (actions / "event.json").write_text(text, encoding="latin-1")

    with pytest.raises(MachineError, match="not the JSON of an event"):
        runner.event()


def test_an_event_larger_than_github_sends_is_an_error(actions: Path) -> None:
    """No payload is above 25 MB; a larger file is none of GitHub's."""
    with (actions / "event.json").open("wb") as file:
        file.truncate((25 << 20) + 1)

    with pytest.raises(MachineError, match="more bytes than GitHub sends"):
        runner.event()


def test_the_address_of_the_run_is_that_of_the_server(
    actions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Enterprise Server has its own; a name that is none gives no address."""
    assert actions
    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r")
    monkeypatch.setenv("GITHUB_RUN_ID", "77")
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://git.example")

    assert runner.run_url() == "https://git.example/o/r/actions/runs/77"

    monkeypatch.setenv("GITHUB_REPOSITORY", "o/r\n::error::x")
    assert runner.run_url() is None


def test_each_line_of_a_secret_is_masked(actions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runner masks by line; a blank line would mask everything."""
    assert actions

    runner.mask("one\n\n50%\n")

    assert capsys.readouterr().err == "::add-mask::one\n::add-mask::50%25\n"
