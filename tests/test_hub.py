"""
Fetch of an `hf:` source: from a stand-in for the Hub that makes mistakes, over real connections.

The transfer runs in a process of its own, as it does for an operator.
"""

from __future__ import annotations

import hashlib
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
from checkpoints import CONFIG, PARAMETERS_COUNT, declare, tiny
from hub import INSIDER, Fault, Hub
from hub import server as hub_server
from hub.faults import Reply
from huggingface_hub import close_session

from pipelines import dvc_state, fetch, hub_metadata, proc, records
from pipelines.errors import (
    DigestError,
    FleetError,
    MachineError,
    RetryLaterError,
    UpstreamError,
)
from pipelines.fetch_downloads import Downloads
from pipelines.hub import HubRepo
from pipelines.hub_download import Patience
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hub import Repo

    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent
NAME = "acme/Tiny-Llama"
SOURCE = f"hf:{NAME}"
WEIGHTS = "model.safetensors"
TAKEN = ["README.md", "config.json", WEIGHTS, "tokenizer.model", "tokenizer_config.json"]
# As patient as an operator, in hundredths of the time.
PATIENT = Patience(
    deadline_s=60, min_rate_bytes_s=100_000, stall_s=5, tries=3,
    first_pause_s=0.01, longest_pause_s=0.02,
)  # fmt: skip
HASTY = Patience(deadline_s=60, stall_s=5, tries=0, first_pause_s=0.01, longest_pause_s=0.02)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub that this process and its children use."""
    with Hub() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> Repo:
    """A good model on it, with code and weights that no build reads."""
    files = contents(tiny(tmp_path / "upstream"))
    files |= {"modeling_tiny.py": b"raise SystemExit", "onnx/model.safetensors": b"x"}
    return hub.create(NAME, files)


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    """A checkout."""
    return Layout(tmp_path / "checkout")


def contents(directory: Path) -> dict[str, bytes]:
    """Read a directory."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def bring(at: Layout, revision: str, patience: Patience = PATIENT, **options: Any) -> fetch.Fetched:
    """Fetch as the stage does, with a table of one architecture."""
    downloads = Downloads(at, "tiny", SOURCE, revision)
    return fetch.fetch(
        HubRepo(NAME, revision, downloads=downloads, patience=patience),
        at.source("tiny"),
        label="fetch tiny",
        known_architectures=frozenset({"LlamaForCausalLM"}),
        llama_cpp_commit="0c1e57098",
        revision=None,
        **options,
    )


def refused(at: Layout, revision: str, patience: Patience = PATIENT) -> FleetError:
    """Fetch in vain; nothing has a final name, and what is said is for people."""
    with pytest.raises(FleetError) as caught:
        bring(at, revision, patience)
    assert not at.source("tiny").exists()
    assert not list(at.root.rglob(".source*"))
    assert caught.value.hint
    return caught.value


def parts(at: Layout) -> dict[str, int]:
    """What is kept of unfinished files: {name: bytes}."""
    return {path.name: path.stat().st_size for path in at.downloads.glob("*.part")}


def is_whole(at: Layout, repo: Repo, revision: str | None = None) -> bool:
    """Tell whether exactly the files of a build are there, byte for byte, and nothing is kept."""
    files = repo.revision(revision or repo.head)
    found = {path.name: path.read_bytes() for path in at.source("tiny").iterdir()}
    return found == {name: files[name] for name in TAKEN} and parts(at) == {}


# --- what is fetched --------------------------------------------------------------------------


def test_a_good_repository_is_fetched_whole_and_verified(hub: Hub, repo: Repo, at: Layout) -> None:
    """Exactly the files of a build, by one listing, each asked for once; no bookkeeping stays."""
    fetched = bring(at, repo.head)

    assert is_whole(at, repo)
    files = repo.revision(repo.head)
    assert {name: one.sha256 for name, one in fetched.digests.items()} == {
        name: hashlib.sha256(files[name]).hexdigest() for name in TAKEN
    }
    assert fetched.checkpoint.parameters_count == PARAMETERS_COUNT
    assert len(hub.asked("/api/*")) == 1
    assert hub.sent_bytes(f"*/{WEIGHTS}") == len(files[WEIGHTS])
    assert all(repo.head in each.path for each in hub.asked("/acme/*"))
    assert not hub.asked("*.py") + hub.asked("*/onnx/*")
    assert not list(at.root.rglob("*.incomplete"))


def test_a_gated_model_is_fetched_with_a_token_that_only_the_hub_gets(
    repo: Repo, at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage refuses a request with a token; without one, the model itself is refused."""
    repo.gate("manual")
    error = refused(at, repo.head)
    assert isinstance(error, UpstreamError)
    assert "is gated" in error.message

    monkeypatch.setenv("HF_TOKEN", INSIDER)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
    seen: list[str] = []
    real = proc.Dialogue

    def spy(argv: list[str], **options: Any) -> Any:
        seen.extend(argv)
        return real(argv, **options)

    monkeypatch.setattr(proc, "Dialogue", spy)
    assert bring(at, repo.head).gated == "manual"
    assert is_whole(at, repo)
    assert INSIDER not in " ".join(seen)


def test_the_size_of_a_model_is_asked_without_its_weights(hub: Hub, repo: Repo, at: Layout) -> None:
    """The listing and config.json tell bytes, weights and vocabulary before anything is fetched."""
    size = fetch.size_of(SOURCE, repo.head, at)

    assert size.vocabulary_tokens == CONFIG["vocab_size"]
    assert size.parameters_count == len(repo.revision(repo.head)[WEIGHTS]) // 2
    assert hub.sent_bytes("/storage/*") == 0
    assert not at.downloads.exists()


# --- wrong bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(WEIGHTS, "flip"), ("config.json", "flip"), (WEIGHTS, "html_padded"), (WEIGHTS, "short"),
     (WEIGHTS, "chunked_short")],
)  # fmt: skip
def test_wrong_bytes_are_refused_with_file_wanted_and_got(
    name: str, kind: str, hub: Hub, repo: Repo, at: Layout
) -> None:
    """A flipped bit in LFS or git, a login page, a pointer: asked for twice, nothing is kept."""
    hub.fault(f"*/{name}", Fault(kind), times=None)

    error = refused(at, repo.head)

    assert isinstance(error, DigestError), error.message
    assert error.message.startswith(f"{name} of {SOURCE} at {repo.head[:12]}")
    assert re.search(r"wanted .* got .*", error.message)
    assert len([each for each in hub.asked(f"*/{name}") if each.sent_bytes]) <= 2
    file = next(each for each in repo.commits[repo.head].tree.values() if each.name == name)
    assert f"{file.etag}.part" not in parts(at)


def test_wrong_bytes_of_one_answer_are_asked_for_once_more(
    hub: Hub, repo: Repo, at: Layout
) -> None:
    """A proxy's hiccup costs a transfer; the second one begins at the first byte."""
    hub.fault(f"*/{WEIGHTS}", Fault("flip", at_byte=77_777))

    bring(at, repo.head)

    assert is_whole(at, repo)
    assert [each.range for each in hub.asked(f"/storage/*{WEIGHTS}")] == ["", ""]


# --- what passes ------------------------------------------------------------------------------


def test_faults_that_pass_cost_time_and_nothing_else(hub: Hub, repo: Repo, at: Layout) -> None:
    """A file that breaks in every way that passes is there in the end, from where it broke."""
    size = len(repo.revision(repo.head)[WEIGHTS])
    faults = [
        Fault("status", status=503), Fault("reset_before"), Fault("retry_after", retry_after="0"),
        Fault("reset_mid", at_byte=90_000), Fault("allowance", retry_after="0"),
        Fault("cut_mid", at_byte=90_000), Fault("wrong_etag"), Fault("status", status=500),
        Fault("retry_date", retry_after="0"), Fault("no_length_cut", at_byte=50_000),
        Fault("status", status=408), Fault("redirect_loop"), Fault("no_length"),
    ]  # fmt: skip
    for fault in faults:
        hub.fault(f"/storage/*{WEIGHTS}", fault)
    for kind in ("gzip", "endless", "chunked", "long"):
        hub.fault("/storage/*tokenizer.model" if kind == "endless" else "*/README.md", Fault(kind))

    bring(at, repo.head, Patience(**(vars(PATIENT) | {"tries": 20})))

    assert is_whole(at, repo)
    asked = hub.asked(f"/storage/*{WEIGHTS}")
    assert {each.range for each in asked} == {
        "", "bytes=90000-", "bytes=180000-", "bytes=230000-",
    }  # fmt: skip
    assert sum(each.sent_bytes for each in asked if each.status in {200, 206}) == size


@pytest.mark.parametrize("kind", ["wrong_range", "range_lie", "range_ignored", "range_refused"])
def test_a_wrong_answer_to_a_range_makes_no_wrong_file(
    kind: str, hub: Hub, repo: Repo, at: Layout
) -> None:
    """Another part, everything, or nothing: then the file is begun again."""
    hub.fault(f"/storage/*{WEIGHTS}", Fault("cut_mid", at_byte=100_000))
    hub.fault(f"/storage/*{WEIGHTS}", Fault(kind))

    bring(at, repo.head)

    assert is_whole(at, repo)


@pytest.mark.parametrize("kind", ["stall_mid", "stall_before", "drip"])
def test_a_transfer_that_hangs_is_ended_with_its_process_and_goes_on(
    kind: str, hub: Hub, repo: Repo, at: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silence, and a byte now and then, end after the time that is declared."""
    hub.fault(f"/storage/*{WEIGHTS}", Fault(kind, at_byte=100_000, pause_s=0.02))

    bring(at, repo.head, Patience(**(vars(PATIENT) | {"stall_s": 0.4})))

    assert is_whole(at, repo)
    assert "it was slower than 98 KiB/s for 0 s; on the plain way now" in capsys.readouterr().err
    assert len(hub.asked(f"/storage/*{WEIGHTS}")) == 2


# --- what does not ----------------------------------------------------------------------------

LATER: dict[str, tuple[Fault, dict[str, float], str]] = {
    "busy": (Fault("status", status=503), {"tries": 2}, "the Hub answers 503"),
    "hangs": (Fault("stall_mid"), {"stall_s": 0.3}, "it was slower than"),
    "drips": (Fault("drip", pause_s=0.01), {"stall_s": 0.3}, "it was slower than"),
    "resets": (Fault("reset_before"), {"tries": 1}, "did not come"),
    "circle": (Fault("redirect_loop"), {"tries": 0}, "leads in a circle"),
    "deadline": (Fault("stall_mid"), {"deadline_s": 1.0}, "1 s were not enough"),
    "wants an hour": (
        Fault("retry_after", status=429, retry_after="3600"), {},
        "asks to be left alone for 60 min",
    ),
    "wants a date": (
        Fault("retry_date", retry_after="90"), {}, r"asks to be left alone for (?:90|89) s"
    ),
    "wants for ever": (
        Fault("retry_after", retry_after="9" * 12), {}, "asks to be left alone for 527,040 min"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "patience", "why"), LATER.values(), ids=LATER.keys())
def test_a_hub_that_does_not_recover_means_try_again_later(  # noqa: PLR0913, PLR0917 - fixtures
    fault: Fault, patience: dict[str, Any], why: str, hub: Hub, repo: Repo, at: Layout
) -> None:
    """Exit 75 at once or at the deadline, never hours later, and with what came."""
    hub.fault(f"/storage/*{WEIGHTS}", fault, times=None)
    started = time.monotonic()

    error = refused(at, repo.head, Patience(**(vars(PATIENT) | patience)))

    assert isinstance(error, RetryLaterError)
    assert re.search(why, error.message), error.message
    assert time.monotonic() - started < 30
    if "retry" in fault.kind:
        assert re.search(r"after \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", error.hint)
    assert parts(at), "what came is kept"


def test_a_hub_that_is_down_or_forbidden_means_try_again_later(
    hub: Hub, repo: Repo, at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused connection, and HF_HUB_OFFLINE, are exit 75 with what to check."""
    with monkeypatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        down = refused(at, repo.head, HASTY)
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        offline = refused(at, repo.head, HASTY)
    hub.fault("/storage/*", Fault("status"), times=None)
    mid = refused(at, repo.head, HASTY)

    assert {type(error) for error in (down, offline, mid)} == {RetryLaterError}
    assert "http://127.0.0.1:9 cannot be reached" in down.message
    assert "HF_HUB_OFFLINE is set" in offline.message


def test_a_listing_that_drips_is_no_answer(hub: Hub, repo: Repo, at: Layout) -> None:
    """A byte now and then is a hung transfer for a listing as well, long before the deadline."""
    hub.fault("/api/*", Fault("drip", pause_s=0.05), times=None)
    started = time.monotonic()

    error = refused(at, repo.head, Patience(**(vars(HASTY) | {"stall_s": 0.3})))

    assert isinstance(error, RetryLaterError)
    assert "the answer did not end in time" in error.message
    assert time.monotonic() - started < 30


def test_whoever_waits_for_a_listing_is_told_for_how_long(
    hub: Hub, repo: Repo, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hub that wants to be left alone gets that, and the operator a word."""
    hub.fault("/api/*", Fault("retry_after", status=429, retry_after="40"))
    waited: list[float] = []

    hub_metadata.HubReader(deadline=time.monotonic() + 60, pause=waited.append).at(NAME, repo.head)

    assert waited == [40]
    assert f"hf:{NAME}: the Hub answers 429. Again in 40 s." in capsys.readouterr().err


SETTINGS: dict[str, tuple[dict[str, str], type[FleetError], str]] = {
    "no address": ({"HF_ENDPOINT": "huggingface.co"}, MachineError, 'HF_ENDPOINT is "huggingface'),
    "no port": ({"HF_ENDPOINT": "http://hub:port"}, MachineError, "which is no address of a Hub"),
    "a mirror's password": (
        {"HF_ENDPOINT": "http://me:secret@127.0.0.1:9"}, RetryLaterError,
        "http://127.0.0.1:9 cannot be reached",
    ),
    "a proxy of another kind": (
        {"ALL_PROXY": "socks5://127.0.0.1:9"}, MachineError, "set for its network cannot be used"
    ),
    "no such certificates": (
        {"SSL_CERT_FILE": "/no/such/file"}, MachineError, "set for its network cannot be used"
    ),
    "half a token": (
        {"HF_TOKEN": "hf_secret\u2026", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}, UpstreamError,
        "the token has characters that none has",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "kind", "why"), SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.usefixtures("hub")
def test_settings_that_cannot_be_used_are_said_and_no_secret_with_them(
    settings: dict[str, str], kind: type[FleetError], why: str,
    at: Layout, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A variable of the environment is wrong: which, what to do, and no traceback."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if "HF_TOKEN" in settings:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    close_session()  # which keeps what was set when it was made
    try:
        error = refused(at, "a" * 40, HASTY)
    finally:
        close_session()

    assert type(error) is kind, error.message
    assert why in error.message
    assert "secret" not in error.message + error.hint


# --- a person has to decide -------------------------------------------------------------------

Change = "Callable[[Hub, Repo], object]"


def _at_listing(kind: str, **options: Any) -> Callable[[Hub, Repo], object]:
    return lambda hub, _: hub.fault("/api/*", Fault(kind, **options), times=None)


def _at_file(kind: str, **options: Any) -> Callable[[Hub, Repo], object]:
    return lambda hub, _: hub.fault("/acme/*/tokenizer.model", Fault(kind, **options), times=None)


REFUSALS: dict[str, tuple[Callable[[Hub, Repo], object], type[FleetError], str]] = {
    "gone": (lambda _, repo: repo.delete(), UpstreamError, "is not there"),
    "disabled": (lambda _, repo: repo.disable(), UpstreamError, "was disabled by the Hub"),
    "renamed": (lambda _, repo: repo.rename("acme/New"), UpstreamError, "answers as acme/New"),
    "history rewritten": (
        lambda _, repo: repo.rewrite(repo.revision(repo.head)), UpstreamError, "no such commit"
    ),
    "recreated": (
        lambda _, repo: repo.recreate(repo.revision(repo.head)), UpstreamError, "no such commit"
    ),
    "another commit": (_at_listing("listing_other_sha"), UpstreamError, "with " + "e" * 12),
    "another name": (_at_listing("listing_other_id"), UpstreamError, "answers as mallory/Tiny"),
    "no digests": (_at_listing("listing_missing_digest"), UpstreamError, "without size and digest"),
    "listed twice": (_at_listing("listing_twice"), UpstreamError, "or with several"),
    "no files": (_at_listing("listing_nothing"), UpstreamError, "there are no weights"),
    "names that climb": (_at_listing("listing_names"), UpstreamError, "the unsafe name"),
    "a page for a listing": (_at_listing("listing_html"), RetryLaterError, "does not speak as"),
    "a busy listing": (_at_listing("status", status=502), RetryLaterError, "answers 502"),
    "gated at a file": (_at_file("gated_mid"), UpstreamError, "is gated"),
    "gone at a file": (_at_file("gone_mid"), UpstreamError, "does not exist, or this machine"),
    "disabled at a file": (_at_file("disabled_mid"), UpstreamError, "was disabled by the Hub"),
    "rewritten at a file": (_at_file("rewritten_mid"), UpstreamError, "there is no such commit"),
    "a file that is refused": (_at_file("status", status=451), UpstreamError, "answers 451"),
    "digests of other bytes": (_at_listing("listing_lies"), DigestError, "wanted d{40}"),
    "sizes of other bytes": (_at_listing("listing_wrong_size"), DigestError, r"wanted \d+ bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "why"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_the_hub_refuses_is_said_with_the_action_to_take(  # noqa: PLR0913, PLR0917 - fixtures
    change: Callable[[Hub, Repo], object], kind: type[FleetError], why: str,
    hub: Hub, repo: Repo, at: Layout,
) -> None:  # fmt: skip
    """Each answer has its class of exit code and a next step; no weight byte was sent."""
    revision = repo.head
    change(hub, repo)

    error = refused(at, revision, HASTY)

    assert type(error).exit_code == kind.exit_code, error.message
    assert re.search(why, error.message), error.message
    assert hub.sent_bytes(f"/storage/*{WEIGHTS}") == 0


def test_a_repository_with_pickles_only_is_refused_before_any_download(
    hub: Hub, repo: Repo, at: Layout
) -> None:
    """The listing alone decides."""
    weights = repo.revision(repo.head)[WEIGHTS]
    head = repo.commit(
        {"pytorch_model.bin": weights, WEIGHTS: None, "onnx/model.safetensors": None}
    )

    error = refused(at, head)

    assert "only there as pickles (pytorch_model.bin)" in error.message
    assert all(each.path.startswith("/api/") for each in hub.requests)


def test_a_pickle_under_another_name_is_no_model(repo: Repo, at: Layout) -> None:
    """Its digest is right, and its first bytes are not those of safetensors."""
    error = refused(at, repo.commit({WEIGHTS: b"PK\x03\x04" + bytes(999)}))

    assert isinstance(error, UpstreamError)
    assert "zip archive" in error.message


@pytest.mark.parametrize(
    "config",
    [{"architectures": ["GopherForCausalLM"]}, CONFIG | {"auto_map": {"AutoModel": "m.Model"}}],
    ids=["unsupported architecture", "code"],
)
def test_a_model_that_cannot_be_built_costs_no_weight_byte(
    config: dict[str, Any], hub: Hub, repo: Repo, at: Layout
) -> None:
    """config.json is enough to say so."""
    error = refused(at, repo.commit({"config.json": json.dumps(config).encode()}))

    assert type(error) is UpstreamError
    assert re.search("does not convert GopherForCausalLM|names code of the repo", error.message)
    assert hub.sent_bytes(f"*/{WEIGHTS}") == 0


# --- a disk -----------------------------------------------------------------------------------


def test_what_is_here_already_needs_no_room(
    hub: Hub, repo: Repo, at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is asked for what is missing; too little of it is said before the first byte."""
    hub.fault(f"/storage/*{WEIGHTS}", Fault("cut_mid", at_byte=300_000), times=None)
    refused(at, repo.head, HASTY)
    missing = len(repo.revision(repo.head)[WEIGHTS]) - 300_000
    hub.forget()

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, size))

    free(missing - 1)
    assert isinstance(refused(at, repo.head), MachineError)
    assert hub.sent_bytes("/acme/*") == 0
    free(missing)
    bring(at, repo.head)
    assert is_whole(at, repo)


def test_a_disk_that_fills_up_is_said_as_such(repo: Repo, at: Layout) -> None:
    """The kernel's own refusal, where the weights would go: exit 7, and not tried again."""
    digest = hashlib.sha256(repo.revision(repo.head)[WEIGHTS]).hexdigest()
    at.downloads.mkdir(parents=True)
    (at.downloads / f"{digest}.part").symlink_to("/dev/full")

    error = refused(at, repo.head)

    assert isinstance(error, MachineError)
    assert f"{WEIGHTS}: the disk is full" in error.message


# --- over processes ---------------------------------------------------------------------------


@pytest.mark.toolchain
def test_a_fetch_that_is_killed_goes_on_where_it_was(
    hub: Hub, repo: Repo, tmp_path: Path, tools: Toolchain,
    fleet: Callable[..., subprocess.CompletedProcess[str]],
) -> None:  # fmt: skip
    """
    SIGKILL in a download: the worker is gone as well; the next run asks for the rest only.

    The next one hangs, for as long as params.yaml allows.
    """
    at = Layout(tmp_path)
    declare(tmp_path, tiny(tmp_path / "model"), tools)
    text = at.params.read_text()
    text = re.sub(r"source: .*", f"source: {SOURCE}", text)
    text = re.sub(r"revision: .*", f'revision: "{repo.head}"', text)
    at.params.write_text(f"{text}fetch: {{min_rate_kib_s: 100, stall_seconds: 2}}\n")
    weights = repo.revision(repo.head)[WEIGHTS]
    part = at.downloads / f"{hashlib.sha256(weights).hexdigest()}.part"
    hub.fault(f"/storage/*{WEIGHTS}", Fault("stall_mid", at_byte=200_000))

    killed = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "fetch", "tiny"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while not (part.exists() and part.stat().st_size == 200_000):
        assert killed.poll() is None
        time.sleep(0.01)
    children = psutil.Process(killed.pid).children(recursive=True)
    assert [child for child in children if "pipelines.hub_worker" in child.cmdline()]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert psutil.wait_procs(children, timeout=5)[1] == []
    assert not at.source("tiny").exists()
    hub.forget()
    hub.fault(f"/storage/*{WEIGHTS}", Fault("stall_mid", at_byte=50_000))

    done = fleet("fetch", "tiny")

    assert done.returncode == 0, done.stderr
    assert is_whole(at, repo)
    record = records.read(at.model_record("fetch", "tiny"), records.FetchRecord)
    assert hashlib.sha256(weights).hexdigest() in {file.sha256 for file in record.files}
    asked = hub.asked(f"/storage/*{WEIGHTS}")
    assert [each.range for each in asked] == ["bytes=200000-", "bytes=250000-"]
    assert asked[1].sent_bytes == len(weights) - 250_000
    assert "it was slower than 100 KiB/s for 2 s" in done.stderr
    assert not hub.asked("*/tokenizer.model")


def test_a_worker_that_is_killed_costs_an_attempt(hub: Hub, repo: Repo, at: Layout) -> None:
    """As by a kernel that lacks memory: another one goes on."""
    hub.fault(f"/storage/*{WEIGHTS}", Fault("stall_mid", at_byte=200_000))

    def kill(size_bytes: int) -> None:
        if size_bytes and not killed:
            killed.extend(psutil.Process().children())
            killed[0].kill()

    killed: list[psutil.Process] = []
    source = HubRepo(NAME, repo.head, patience=PATIENT)
    try:
        weights = next(file for file in source.files() if file.name == WEIGHTS)
        digests = source.bring(weights, at.root.parent / "weights", kill)
    finally:
        source.close()

    assert killed
    assert digests.sha256 == weights.sha256
    first, second = hub.asked("/storage/*")
    assert first.range == ""
    assert second.range == f"bytes={weights.size_bytes - second.sent_bytes}-"


def test_shards_that_arrived_are_not_asked_for_again(hub: Hub, at: Layout, tmp_path: Path) -> None:
    """A fetch that fails at its last shard keeps the others, and hashes them again."""
    repo = hub.create(NAME, contents(tiny(tmp_path / "upstream", shards=3)))
    hub.fault("/storage/*00003-of-00003*", Fault("status"), times=None)
    refused(at, repo.head, HASTY)
    with (at.downloads / max(parts(at), key=parts(at).__getitem__)).open("r+b") as file:
        file.write(b"rot")
    hub.forget()

    bring(at, repo.head)

    assert parts(at) == {}
    assert all(
        (at.source("tiny") / name).read_bytes() == content
        for name, content in repo.revision(repo.head).items()
    )
    asked = [each.path.rpartition("/")[2] for each in hub.requests if each.sent_bytes]
    assert len(asked) == 1 + 1 + 1, "the listing, the one that failed, and the one that has rotted"


@pytest.mark.parametrize("size", [-1, 1], ids=["shorter", "longer"])
def test_a_beginning_that_a_model_has_by_now_is_not_written_to(
    size: int, repo: Repo, at: Layout
) -> None:
    """What was whole for a model of the same file is linked there, and in DVC's cache."""
    weights = repo.revision(repo.head)[WEIGHTS]
    theirs = at.root / "theirs"
    at.downloads.mkdir(parents=True)
    theirs.write_bytes(other := weights[:size] if size < 0 else weights + b"x")
    (at.downloads / f"{hashlib.sha256(weights).hexdigest()}.part").hardlink_to(theirs)

    bring(at, repo.head)

    assert is_whole(at, repo)
    assert theirs.read_bytes() == other


def test_what_this_python_prints_by_itself_is_no_word_of_the_worker(
    repo: Repo, at: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sitecustomize that greets ends no transfer."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("print('hello')\nprint('[1]')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    bring(at, repo.head)

    assert is_whole(at, repo)


def test_what_no_declared_revision_needs_is_removed(hub: Hub, repo: Repo, at: Layout) -> None:
    """A beginning of a file of an older revision goes; what is not ours to remove stays."""
    hub.fault(f"/storage/*{WEIGHTS}", Fault("cut_mid"), times=None)
    refused(at, repo.head, HASTY)
    old = hashlib.sha256(repo.revision(repo.head)[WEIGHTS]).hexdigest()
    assert f"{old}.part" in parts(at)
    nobodys = at.downloads / f"{'a' * 64}.part"
    nobodys.write_bytes(b"x")
    note = at.downloads / "note.txt"
    note.write_text("an operator's")

    head = repo.commit({WEIGHTS: tiny(at.root / "new", seed=2).joinpath(WEIGHTS).read_bytes()})
    refused(at, head, HASTY)

    assert f"{old}.part" not in parts(at)
    assert not nobodys.exists()
    assert note.exists()


# --- what DVC has -----------------------------------------------------------------------------


def dvc(root: Path, *argv: str) -> None:
    """Run DVC or, where that is the first word, git."""
    program = ["git", "-c", "user.name=T", "-c", "user.email=t@example.invalid"]
    words = [*program, *argv[1:]] if argv[0] == "git" else [sys.executable, "-m", "dvc", *argv]
    subprocess.run(words, cwd=root, check=True, capture_output=True)


def test_a_new_template_brings_no_weight_byte(
    hub: Hub, repo: Repo, at: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What an earlier revision had is taken from DVC's cache, by the record that git has.

    DVC has removed directory and record by then, as it does before it runs a stage. An object of
    the cache that has rotted is not taken.
    """
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    fetched = bring(at, repo.head)
    record = records.FetchRecord(
        model="tiny", source=SOURCE, revision=repo.head, architecture="LlamaForCausalLM",
        license=None, parameters_count=1, dtypes={}, size_bytes=1,
        files=tuple(
            records.FileDigest(name=name, **vars(one)) for name, one in fetched.digests.items()
        ),
    )  # fmt: skip
    records.write(at.model_record("fetch", "tiny"), record)
    dvc(at.root, "git", "init", "-qb", "main")
    dvc(at.root, "init", "-q")
    dvc(at.root, "config", "cache.type", "hardlink,symlink")
    dvc(at.root, "add", "-q", "work/tiny/source")
    dvc(at.root, "git", "add", "results", ".dvc")
    dvc(at.root, "git", "commit", "-qm", "fetched")
    template = b"{% for message in messages %}{{ message.content }}{% endfor %}"
    head = repo.commit({"chat_template.jinja": template}, "Fix the template")

    def anew() -> None:
        shutil.rmtree(at.source("tiny"))
        at.model_record("fetch", "tiny").unlink(missing_ok=True)
        hub.forget()
        bring(at, head)
        assert (at.source("tiny") / "chat_template.jinja").read_bytes() == template
        assert {name: (at.source("tiny") / name).read_bytes() for name in TAKEN} == {
            name: repo.revision(head)[name] for name in TAKEN
        }

    anew()
    assert hub.sent_bytes("/acme/*") + hub.sent_bytes("/storage/*") == len(template)
    assert (at.source("tiny") / WEIGHTS).stat().st_nlink > 1

    md5 = hashlib.md5(repo.revision(head)[WEIGHTS]).hexdigest()
    cached = dvc_state.cache_dir(at.root) / "files/md5" / md5[:2] / md5[2:]
    content = bytearray(cached.read_bytes())
    content[5000] ^= 1
    cached.chmod(0o644)
    cached.write_bytes(content)
    cached.chmod(0o444)  # by which DVC believes it without a look
    anew()
    assert hub.sent_bytes(f"/storage/*{WEIGHTS}") == len(content)
    dvc(at.root, "add", "-q", "work/tiny/source")
    assert (at.source("tiny") / WEIGHTS).read_bytes() == repo.revision(head)[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_mirror_with_other_bytes_than_those_on_record_is_refused(
    name: str, hub: Hub, repo: Repo, at: Layout
) -> None:
    """Its listing fits its files; the record of the same revision, made elsewhere, does not."""
    file = records.FileDigest(name=name, size_bytes=7, sha256="a" * 64, md5="b" * 32)
    record = records.FetchRecord(
        model="tiny", source=SOURCE, revision=repo.head, architecture="LlamaForCausalLM",
        license=None, parameters_count=1, dtypes={}, size_bytes=7, files=(file,),
    )  # fmt: skip
    records.write(at.model_record("fetch", "tiny"), record)

    error = refused(at, repo.head)

    assert isinstance(error, DigestError)
    assert f"its record says sha256 {'a' * 64}" in error.message
    assert hub.sent_bytes(f"*/{WEIGHTS}") == 0


# --- xet --------------------------------------------------------------------------------------


# In a process of its own, since it keeps the storage for itself while it lives.
UPLOAD = """
import hf_xet, sys
with hf_xet.XetSession().new_upload_commit(endpoint=sys.argv[1]) as commit:
    upload = commit.start_upload_file(sys.argv[2])
print(upload.result().xet_info.hash)
"""


@pytest.mark.parametrize("hangs", [False, True], ids=["resumed", "hangs"])
def test_a_file_that_xet_has_is_resumed_and_when_xet_hangs_it_comes_the_plain_way(  # noqa: PLR0913, PLR0917 - fixtures
    hangs: bool,  # noqa: FBT001 - of pytest
    hub: Hub, repo: Repo, at: Layout, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The real hf_xet, with a storage in a directory, or one that never answers."""
    weights = repo.revision(repo.head)[WEIGHTS]
    storage = f"local://{tmp_path / 'cas'}"
    xet_hash = subprocess.check_output(
        [sys.executable, "-c", UPLOAD, storage, tmp_path / "upstream" / WEIGHTS], text=True
    ).strip()
    address = f"{hub.url}/api/models/{NAME}/xet-read-token/{repo.head}"
    real = hub_server._Handler._routed

    def routed(self: Any) -> Any:
        if "xet-read-token" in self.parts:
            headers = {
                "X-Xet-Cas-Url": hub.url if hangs else storage,
                "X-Xet-Access-Token": "x",
                "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            }
            return Reply(200, headers)
        reply = real(self)
        if self.parts[-1] == WEIGHTS and "resolve" in self.parts:
            reply.headers["X-Xet-Hash"] = xet_hash
            reply.headers["Link"] = f'<{address}>; rel="xet-auth"'
        return reply

    monkeypatch.setattr(hub_server._Handler, "_routed", routed)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "0")
    hub.fault("/*reconstructions/*", Fault("stall_before"), times=None)
    at.downloads.mkdir(parents=True)
    part = at.downloads / f"{hashlib.sha256(weights).hexdigest()}.part"
    part.write_bytes(weights[:123_456])

    bring(at, repo.head, Patience(**(vars(PATIENT) | {"stall_s": 1.0 if hangs else 20.0})))

    assert is_whole(at, repo)
    sent = hub.sent_bytes(f"/storage/*{WEIGHTS}")
    assert sent == (len(weights) - 123_456 if hangs else 0)
    assert len(hub.asked(f"/acme/*{WEIGHTS}", "HEAD")) == 1, "what was there was of use"
    assert ("on the plain way now" in capsys.readouterr().err) == hangs
