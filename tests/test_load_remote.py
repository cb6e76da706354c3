"""`fleet load-test MODEL --url`: somebody's running server, found, driven, judged and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
from scripted_server import Page, Script, serve

from pipelines import load_remote
from pipelines.errors import ParamsError, RetryLaterError
from pipelines.load import access

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

ROOT = Path(__file__).resolve().parent.parent
OLLAMA = {
    "/api/version": {"version": "0.33.0"},
    "/api/tags": {"models": [{"name": "served:latest"}, {"name": "other:latest"}]},
}
OPENAI = {"/v1/models": {"data": [{"id": "served"}]}}
QUICK = """
load_test:
  concurrency: [1, 2]
  requests: 10
  open_requests: 80
  rate_per_s: 200
  warm_up_requests: 1
  prompt_tokens: 16
  generate_tokens: 8
  timeout_seconds: 5
  slo: {ttft_ms: LIMIT, min_goodput: 0.9}
"""


@pytest.fixture(name="fork")
def _fork(tmp_path: Path) -> Path:
    """A checkout whose load test is short and patient."""
    root = tmp_path / "fork"
    sample.take(root, "examples", "corpora", "modelfiles")
    declare(root, limit_ms=20_000)
    return root


def declare(root: Path, *, limit_ms: float) -> None:
    """Write params.yaml with one limit on the first token."""
    text = sample.params_text()
    head, _, rest = text.partition("\nload_test:\n")
    _, _, tail = rest.partition("\n\n")
    (root / "params.yaml").write_text(
        f"{head}\n{QUICK.replace('LIMIT', str(limit_ms))}\n{tail}", encoding="utf-8"
    )


def drive(fleet: Fleet, root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the verb in the checkout."""
    return fleet("load-test", "tiny-llama", *options, cwd=root)


@pytest.mark.parametrize(
    ("pages", "api", "version"),
    [(OLLAMA, "ollama", "Ollama 0.33.0"), (OPENAI, "openai", "BaseHTTP")],
)
def test_the_dialect_of_a_server_is_found_out_and_it_is_driven(
    fork: Path, fleet: Fleet, pages: dict[str, Any], api: str, version: str
) -> None:
    """Ladder, random arrivals, levels, calibration: as JSON, and nothing else on stdout."""
    with serve(Script(tokens=4), pages=pages) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "served", "--json")

    told = json.loads(done.stdout)
    assert told["api"] == api
    assert told["engine"]["version"].startswith(version)
    assert [run["name"] for run in told["runs"]] == ["closed 1", "closed 2", "open"]
    assert all(run["ok_count"] == run["requests_count"] for run in told["runs"])
    assert {gate["name"]: gate["outcome"] for gate in told["gates"]} == {
        "ttft": "PASS", "goodput": "PASS",
    }  # fmt: skip
    assert done.returncode == (5 if told["invalid"] else 0)
    assert not (fork / "results").exists()


def test_a_missed_level_is_told_with_its_counts_and_exits_with_5(fork: Path, fleet: Fleet) -> None:
    """In the table and in the error."""
    declare(fork, limit_ms=0.001)
    with serve(Script(tokens=4), pages=OLLAMA) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "served")

    assert done.returncode == 5
    assert "FAIL: 0 of 80 requests had the first token within 0.001 ms" in done.stdout
    assert "1 at a time" in done.stdout
    assert "Traceback" not in done.stderr


def test_failures_of_a_server_are_counted_by_class_and_end_nothing(
    fork: Path, fleet: Fleet
) -> None:
    """Each request fails in its own way, and the runs go on to their end."""
    with serve(Script(fault="empty", prompt_tokens=10), pages=OLLAMA) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "served", "--json")

    told = json.loads(done.stdout)
    assert [run["errors"] for run in told["runs"]] == [
        {"empty_output": 10}, {"empty_output": 10}, {"empty_output": 80},
    ]  # fmt: skip
    assert done.returncode == 5
    assert "0 of 80 requests" in done.stderr


def test_a_server_that_answers_nothing_at_all_is_an_error_with_its_log(
    fork: Path, fleet: Fleet
) -> None:
    """Even the first two requests, which ask how the text is tokenized, have no answer."""
    with serve(Script(fault="status"), pages=OLLAMA) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "served", "--json")

    assert (done.returncode, done.stdout) == (4, "")
    assert "http_5xx" in done.stderr
    assert "log:" in done.stderr


def test_a_run_in_which_nothing_was_judged_is_no_success(fork: Path, fleet: Fleet) -> None:
    """Without a success in the ladder there is no rate for the open run, and so no level."""
    text = (fork / "params.yaml").read_text(encoding="utf-8")
    (fork / "params.yaml").write_text(text.replace("  rate_per_s: 200\n", ""), encoding="utf-8")
    with serve(Script(fault="empty"), pages=OLLAMA) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "served", "--json")

    assert json.loads(done.stdout)["gates"] == []
    assert done.returncode == 5
    assert "answered no request of the ladder" in done.stderr


def test_a_second_test_of_a_server_finds_none_of_its_prompts_in_a_cache(
    fork: Path, fleet: Fleet
) -> None:
    """A server that keeps what it has read would answer at once, and no time would be true."""
    with serve(Script(tokens=2), pages=OLLAMA) as server:
        for _ in range(2):
            drive(fleet, fork, "--url", server.url, "--name", "served", "--json")
    # The two that ask how the text is tokenized are not timed.
    said = [each.body["messages"][-1]["content"] for each in server.seen]
    timed = [text for text in said if said.count(text) == 1]

    assert len(timed) == len(said) - 4
    assert len({text[:12] for text in timed}) == len(timed)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--url", "http://127.0.0.1:1"), 75, "nothing answers at http://127.0.0.1:1"),
        (("--url", "ftp://x"), 2, "is no address of a server"),
        (("--url", "http://u:secret@127.0.0.1"), 2, "holds a password"),
        (("--url", "http://u:secret@127.0.0.1:99999"), 2, "is no address of a server"),
        (("--url", "http://secret@127.0.0.1"), 2, "GGUF_FLEET_API_KEY"),
        (("--url", "http://127.0.0.1:1", "--sweep", "gpu_layers"), 2, "goes with neither"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    fork: Path, fleet: Fleet, options: tuple[str, ...], code: int, said: str
) -> None:
    """With its exit code, and never a secret of the caller's."""
    done = drive(fleet, fork, *options)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_there_is_told_with_those_that_are(fork: Path, fleet: Fleet) -> None:
    """A near miss is suggested."""
    with serve(pages=OLLAMA) as server:
        done = drive(fleet, fork, "--url", server.url, "--name", "servd:latest")

    assert done.returncode == 2
    assert 'no model "servd:latest"' in done.stderr
    assert "served:latest" in done.stderr


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("localhost:11434", "http://localhost:11434"),
        ("http://box:8000/v1/", "http://box:8000"),
        ("https://box/api", "https://box"),
        ("https://box/behind/proxy", "https://box/behind/proxy"),
    ],
)
def test_what_people_paste_becomes_the_root_of_a_server(text: str, root: str) -> None:
    """With or without a scheme, and without the path of an API."""
    assert load_remote.checked_url(text) == root


def test_a_server_that_is_neither_is_refused() -> None:
    """Something answers, but no model does."""
    with serve(pages={"/": "hello"}) as server, pytest.raises(ParamsError) as caught:
        load_remote.identify(server.url, None)

    assert "neither Ollama's API nor the OpenAI-compatible one" in caught.value.message


@pytest.mark.parametrize(
    ("page", "error", "said"),
    [
        (Page(status=302, headers={"Location": "http://elsewhere/\x1b[2J"}), ParamsError,
         "sends us on to http://elsewhere/."),
        (Page(status=401), ParamsError, "refuses us: status 401"),
        (Page(body=b"[" * 100_000), ParamsError, "neither"),
        (Page(body=b" " * (1 << 16), endless=True), ParamsError, "neither"),
        (Page(body=b'{"version', headers={"Content-Length": "1000"}), RetryLaterError, "nothing"),
    ],
)  # fmt: skip
def test_a_server_that_means_harm_gets_one_bounded_answer_read(
    page: Page, error: type[Exception], said: str
) -> None:
    """No redirect is followed, no answer without an end or a bottom is taken in."""
    pages = {"/api/version": page, "/v1/models": page}
    with serve(pages=pages) as server, pytest.raises(error) as caught:
        load_remote.identify(server.url, None)

    assert said in str(caught.value)
    assert {each.path for each in server.asked} <= set(pages)


@pytest.mark.parametrize("listed", [[1], {"models": 7}, {"models": [None, {"name": 1}, {}]}, "x"])
def test_a_list_of_models_that_is_none_is_empty(listed: Any) -> None:
    """What is no name of a model is none."""
    with serve(pages={"/api/tags": listed}) as server:
        assert load_remote.names(server.url, "ollama") == []


def test_the_key_of_a_server_is_told_to_it_and_nothing_else_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Servers of others want one before they list their models; no proxy learns it."""
    monkeypatch.setenv(access.API_KEY_ENV, "planted-key")
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    with serve(pages=OPENAI) as server:
        assert load_remote.identify(server.url, None)[0] == "openai"

    assert {each.headers["authorization"] for each in server.asked} == {"Bearer planted-key"}


def test_the_only_model_of_a_server_needs_no_name() -> None:
    """A llama-server has one, called after its file."""
    wanted = load_remote.Wanted(url="", api=None, name=None, key="my-model")

    assert load_remote.pick_name(["/models/x.gguf"], wanted) == "/models/x.gguf"
    assert load_remote.pick_name(["a", "my-model:latest"], wanted) == "my-model:latest"
