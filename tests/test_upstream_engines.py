"""What is newer of the engines: by the index of pip, by Go, by GitHub; and what follows from it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sample
from index_stand_in import BELOW, PAGE, Answer, Index, anchors, page, sdist, serving

from pipelines import declaration, go_versions, package_index, upstream_engines
from pipelines.engine_releases import Listing, Pin, Release, pins_of
from pipelines.params import CheckUpstream, Declaration, IgnoredReleases
from pipelines.serving import ollama_install
from pipelines.upstream_records import EngineUpstream, UpstreamRecord

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.upstream_records import Engine

ROOT = Path(__file__).resolve().parent.parent
MODULE = ollama_install.MODULE
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LONG_AGO = "2026-08-25T22:03:57Z"
OWN = "b" * 64
NEW = "c" * 64
DEADLINE_S = 20.0

needs_go = pytest.mark.skipif(
    shutil.which("go") is None and not Path("/usr/local/go/bin/go").exists(),
    reason="Go is not installed",
)


@pytest.fixture(scope="module")
def index() -> Iterator[Index]:
    """A server that is an index, and a GitHub."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose private pip, if this environment needs one, is made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def machine(
    index: Index, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """A machine whose pip has this index and nothing else, with no Go and no GitHub."""
    import os  # noqa: PLC0415 - to list what is there

    index.answers.clear()
    index.asked.clear()
    index.login = None
    for name in os.environ:
        if name.startswith(("PIP_", "GO")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(home))
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}{BELOW}")
    monkeypatch.setenv("GOSUMDB", "off")
    monkeypatch.setenv("GOPROXY", "off")
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@cache
def _fleet() -> Declaration:
    return declaration.load(sample.of("params.yaml"))


def declared(
    llama: str = "0.3.33",
    ollama: str = "0.33.0",
    *,
    engine: str = "llama-server",
    archive: str | None = None,
    **watch: Any,
) -> Declaration:
    """A declaration that pins these; only llama.cpp is in use unless `engine` says otherwise."""
    whole = _fleet()
    return whole.model_copy(
        update={
            "toolchain": whole.toolchain.model_copy(
                update={"llama_cpp_python": llama, "sha256": OWN}
            ),
            "serving": whole.serving.model_copy(
                update={"engine": engine, "ollama": ollama, "ollama_archive_sha256": archive}
            ),
            "check_upstream": CheckUpstream(**watch),
        }
    )


def look(
    wanted: Declaration,
    *before: EngineUpstream,
    now: datetime = NOW,
    within_s: float = DEADLINE_S,
    engines: tuple[Engine, ...] | None = None,
) -> tuple[EngineUpstream, ...]:
    """Look, after an earlier look that found `before`."""
    return upstream_engines.look(
        wanted,
        previous=UpstreamRecord(checked_at=now, requests_count=0, models=(), engines=before),
        deadline=time.monotonic() + within_s,
        clock=lambda: now,
        engines=engines,
    )


def llama(*before: EngineUpstream, now: datetime = NOW, **watch: Any) -> EngineUpstream:
    """Look for llama.cpp."""
    (found,) = look(declared(**watch), *before, now=now)
    return found


# --- the index that pip is configured with ----------------------------------------------------


def test_the_newest_release_comes_with_the_index_s_own_digest_size_and_time(index: Index) -> None:
    """Pre-releases, withdrawn ones, wheels and what this Python cannot install do not count."""
    wheel = sdist("0.3.99") | {"filename": "llama_cpp_python-0.3.99-py3-none-any.whl"}
    index.page(
        sdist("0.3.34"), sdist("0.3.33", OWN), sdist("0.3.9"), sdist("0.3.10"),
        sdist("0.3.36", NEW), sdist("0.3.35"), sdist("0.3.40rc1"), sdist("0.3.41.dev1"),
        sdist("0.3.38", yanked="broken"), sdist("0.3.39", yanked=True),
        sdist("0.3.42", **{"requires-python": "<3"}), wheel,
        sdist("0.3.98") | {"filename": "other_package-0.3.98.tar.gz"},
    )  # fmt: skip

    found = llama()

    assert (found.state, found.pinned, found.newest) == ("moved", "0.3.33", "0.3.36")
    assert (found.sha256, found.size_bytes) == (NEW, 70_000_000)
    assert found.newest_at == datetime(2026, 10, 1, 5, 48, 1, 345495, tzinfo=UTC)
    assert found.versions_between == ("0.3.35", "0.3.34")
    assert found.reason == "llama-cpp-python 0.3.36 was released on 2026-10-01."
    assert (found.last_success_at, found.requests_count, found.notes) == (NOW, 1, ())
    assert index.asked[0][0] == PAGE


def test_an_index_of_html_alone_tells_no_time_so_age_counts_from_the_first_look(
    index: Index,
) -> None:
    """A company's mirror often speaks PEP 503 alone: a digest, and not a word of when."""
    body = anchors(sdist("0.3.33", OWN), sdist("0.3.36", NEW), sdist("0.3.37", yanked=""))
    index.answers[PAGE] = Answer(kind="text/html; charset=utf-8", body=body)

    first = llama()
    later = llama(first, now=NOW + timedelta(days=3))

    assert (first.state, first.newest, first.newest_at) == ("waiting", "0.3.37", None)
    assert "until 2026-11-25 12:00 UTC" in first.reason
    assert (later.state, later.newest, later.sha256) == ("moved", "0.3.37", "a" * 64)
    assert later.first_seen == first.first_seen == {"0.3.36": NOW, "0.3.37": NOW}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(status=404), "127.0.0.1 does not have llama-cpp-python"),
        (Answer(status=503, kind="text/html"), "127.0.0.1 answers with an error of its own (5xx)"),
        (Answer(body=b"<html><a href='/login'>Log in</a></html>", kind="text/html"), "no release"),
        (Answer(stalls=True), "pip could not ask the package index within"),
    ],
    ids=["404", "503", "login", "silent"],
)
def test_an_index_that_fails_is_unknown_and_no_failure(
    index: Index, answer: Answer, words: str
) -> None:
    """Nothing is raised; what was known of the last success stays."""
    index.answers[PAGE] = answer
    before = EngineUpstream(
        engine="llama.cpp", pinned="0.3.33", state="current", reason="nothing is newer",
        last_success_at=NOW - timedelta(days=1), first_seen={"0.3.36": NOW},
    )  # fmt: skip

    (found,) = look(declared(), before, within_s=1.2 if answer.stalls else DEADLINE_S)

    assert found.state == "unknown"
    # Whoever is late on a busy machine is not waited for.
    assert words in found.reason or (answer.stalls and "did not answer" in found.reason)
    assert (found.newest, found.sha256) == (None, None)
    assert (found.last_success_at, found.first_seen) == (before.last_success_at, before.first_seen)


def test_no_time_and_no_network_are_unknown_within_the_deadline(
    index: Index, machine: pytest.MonkeyPatch
) -> None:
    """A machine that reaches nobody says so; a look that is over asks nobody."""
    nobody, plain = "http://127.0.0.1:1", "http://index.invalid"
    machine.setenv("PIP_INDEX_URL", f"{nobody}{BELOW}")
    (refused,) = look(declared())
    (over,) = look(declared(), within_s=0.1)
    machine.setenv("PIP_INDEX_URL", f"{plain}{BELOW}")
    (distrusted,) = look(declared())
    machine.setenv("PIP_NO_INDEX", "1")
    (told,) = look(declared())

    assert {one.state for one in (refused, over, distrusted, told)} == {"unknown"}
    assert "index.invalid is plain HTTP" in distrusted.reason
    assert "cannot be reached (ConnectionError)" in refused.reason
    assert "the time for the look was over" in over.reason
    assert "no-index" in told.reason
    assert index.asked == []


def test_a_detour_over_plain_http_is_not_believed(
    index: Index, machine: pytest.MonkeyPatch
) -> None:
    """Whoever sits on it may lead to any page; first and last address are safe."""
    machine.setenv("PIP_PROXY", index.url)
    steps = [f"{index.url}{PAGE}", "http://index.invalid/", f"{index.url}/there/"]
    for here, there in pairwise(steps):
        index.answers[here] = Answer(status=302, headers=(("Location", there),))
    index.page(sdist("0.3.33", OWN), sdist("0.3.40", NEW), path=steps[-1])
    found = llama()
    assert [path for path, _ in index.asked] == steps
    assert found.state == "unknown"
    assert "plain HTTP" in found.reason


def test_the_account_of_pip_s_own_configuration_is_used_and_never_shown(
    index: Index, machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The index, with its password and a token in its path, is that of a file of the user."""
    host = index.url.removeprefix("http://")
    machine.delenv("PIP_INDEX_URL")
    config = tmp_path / "config/pip/pip.conf"
    config.parent.mkdir(parents=True)
    address = f"http://bot:s3cret@{host}/t0ken{BELOW}"
    config.write_text(f"[global]\nindex-url = {address}\n")
    index.login = "bot:s3cret"
    index.page(sdist("0.3.36", NEW), sdist("0.3.33", OWN), path=f"/t0ken{PAGE}")
    well = llama()
    index.login = "bot:another"
    refused = llama()

    assert (well.state, well.newest, refused.state) == ("moved", "0.3.36", "unknown")
    assert "refuses us (401)" in refused.reason
    for found in (well, refused):
        assert "s3cret" not in found.model_dump_json()
        assert "t0ken" not in found.model_dump_json()
    assert not any("s3cret" in log.read_text() for log in tmp_path.rglob("*.log"))


def test_another_index_speaks_only_where_the_first_has_no_such_project(
    index: Index, machine: pytest.MonkeyPatch
) -> None:
    """One that is silent may have it: what another one lists must not take its place."""
    machine.setenv("PIP_EXTRA_INDEX_URL", f"{index.url}/extra")
    index.page(sdist("0.3.36", NEW), sdist("0.3.33", OWN), path="/extra/llama-cpp-python/")
    assert llama().newest == "0.3.36"
    index.answers[PAGE] = Answer(status=502, kind="text/html")
    found = llama()
    assert (found.state, found.newest) == ("unknown", None)
    assert "/extra/llama-cpp-python/" not in [path for path, _ in index.asked[2:]]


def test_pip_s_default_is_asked_where_nothing_is_configured(machine: pytest.MonkeyPatch) -> None:
    """No address of an index is in our code: that of pip's own is taken, here without a network."""
    machine.delenv("PIP_INDEX_URL")
    machine.setenv("PIP_PROXY", "http://127.0.0.1:1")

    (found,) = look(declared())

    assert found.state == "unknown"
    assert "is behind a proxy that does not answer" in found.reason
    assert "The package index 127.0.0.1" not in found.reason


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("application/json", b"{}", "no page of packages"),
        ("text/html", b"Bad gateway", "no page of packages"),
        (
            "text/html",
            anchors(meta='<meta name="pypi:repository-version" content="2.0">'),
            "speaks version 2.0",
        ),
        ("application/vnd.pypi.simple.v1+json", page(version="2.1"), "speaks version 2.1"),
        ("application/vnd.pypi.simple.v1+json", b'{"meta": {"api-version": "1.0"}}', "no page"),
        (
            "application/vnd.pypi.simple.v1+json",
            b'{"meta": {"api-version": "1.0"}, "files": [1]}',
            "no list",
        ),
        ("application/vnd.pypi.simple.v1+json", b"[" * 100_000, "no page"),
    ],
)
def test_a_page_that_is_none_is_refused(kind: str, body: bytes, words: str) -> None:
    """A later version of the interface may mean other things by the same words."""
    with pytest.raises(Exception, match=words):
        package_index.read(body.decode(), kind, "llama-cpp-python")


@pytest.mark.parametrize("as_html", [False, True])
def test_what_one_field_says_wrong_is_left_out_and_not_believed(as_html: bool) -> None:  # noqa: FBT001 - a case
    """Both forms of a page mean the same."""
    files = [
        sdist("0.3.1", "A" * 64),
        sdist("0.3.2", "not-a-digest"),
        sdist("0.3.3", None),
        sdist("0.3.4", size=True, **{"upload-time": "yesterday"}),
        sdist("0.3.5", yanked="a <b>reason</b>\x1b[31m"),
        sdist("0.3.6", **{"requires-python": ">=3.8"}),
        sdist("0.3.7", **{"requires-python": "?"}),
        sdist("0.3.8", "d" * 64),
        sdist("0.3.8", "e" * 64) | {"filename": "llama-cpp-python-0.3.8.tar.gz"},
        sdist("0.3.9") | {"url": "https://files.invalid/llama_cpp_python-0.3.9.zip"},
        sdist("../../../etc"),
    ]
    files[8]["url"] = "https://files.invalid/llama-cpp-python-0.3.8.tar.gz"
    files[9]["filename"] = "llama_cpp_python-0.3.9.zip"
    body = anchors(*files) if as_html else page(*files)
    kind = "text/html" if as_html else "application/vnd.pypi.simple.v1+json"

    found = {
        one.version: one
        for one in package_index.read(body.decode(), kind, "llama-cpp-python").sdists
    }

    assert list(found) == ["0.3.8", "0.3.7", "0.3.6", "0.3.5", "0.3.4", "0.3.3", "0.3.2", "0.3.1"]
    assert found["0.3.1"].sha256 == "a" * 64
    assert [found[f"0.3.{n}"].sha256 for n in (2, 3, 8)] == [None, None, None]
    assert (found["0.3.4"].size_bytes, found["0.3.4"].uploaded_at) == (None, None)
    assert found["0.3.5"].yanked == "a <b>reason</b>"
    assert found["0.3.6"].yanked is None


def test_a_project_in_quarantine_is_not_proposed(index: Index) -> None:
    """PEP 792: nothing of it is to be installed."""
    index.page(sdist("0.3.36", NEW), sdist("0.3.33", OWN), status="quarantined")
    found = llama()
    assert (found.state, found.newest) == ("unknown", None)
    assert "quarantine" in found.reason


def test_a_release_that_cannot_be_declared_is_named_and_the_next_one_taken(index: Index) -> None:
    """A pin is three numbers, a post-release is a final one; an archived project says so."""
    files = (sdist("0.3.36.post1"), sdist("0.3.36", NEW), sdist("0.3.33", OWN))
    index.page(*files, status="archived")
    found = llama()
    assert (found.state, found.newest) == ("moved", "0.3.36")
    assert found.notes == (
        "The package index 127.0.0.1 says that llama-cpp-python is archived.",
        "0.3.36.post1 cannot be declared: toolchain.llama_cpp_python is three numbers.",
    )


# --- what follows from a list -----------------------------------------------------------------


PIN = Pin(
    engine="llama.cpp", version="1.0.0", sha256=OWN, ignored=("1.0.9",), cooldown_days=3
)  # fmt: skip


def release(version: str, days: float | None = 30, **fields: Any) -> Release:
    """A release that came so many days ago."""
    at = None if days is None else NOW - timedelta(days=days)
    return Release(version=version, at=at, **({"sha256": NEW} | fields))


def judge(
    *releases: Release, before: EngineUpstream | None = None, now: datetime = NOW, **pin: Any
) -> EngineUpstream:
    """Say what a list with these means, the release in use among them."""
    own = release("1.0.0", 300, sha256=OWN)
    every = releases if any(one.version == "1.0.0" for one in releases) else (*releases, own)
    listing = Listing(said_by="The index", releases=every, pins_digest=True)
    wanted = Pin(**({field: getattr(PIN, field) for field in PIN.__dataclass_fields__} | pin))
    return upstream_engines.judged(wanted, listing, before=before, now=now)


@pytest.mark.parametrize(
    ("releases", "state", "newest", "younger"),
    [
        ([], "current", "1.0.0", None),
        ([release("0.9.9"), release("0.10.0")], "current", "1.0.0", None),
        ([release("1.0.1")], "moved", "1.0.1", None),
        ([release("1.0.10"), release("1.0.2")], "moved", "1.0.10", None),
        ([release("1.0.1", 2.9)], "waiting", "1.0.1", None),
        ([release("1.0.1", 3)], "moved", "1.0.1", None),
        ([release("1.0.1", -5)], "waiting", "1.0.1", None),
        # One that is released each week would wait for ever.
        ([release("1.0.3", 1), release("1.0.2", 8)], "moved", "1.0.2", "1.0.3"),
        ([release("1.0.9")], "ignored", "1.0.9", None),
        ([release("1.0.9"), release("1.0.8")], "moved", "1.0.8", None),
        ([release("1.0.9"), release("1.0.8", 1)], "waiting", "1.0.8", None),
        ([release("1.0.4", withdrawn="bad")], "current", "1.0.0", None),
        ([release("1.0.4", sha256=None)], "asks", "1.0.4", None),
        ([release("1.0.4", 1, sha256=None)], "waiting", "1.0.4", None),
        ([release("1.0.4"), release("1.0.0", sha256=NEW)], "asks", "1.0.4", None),
        ([release("1.0.4"), release("1.0.0", sha256=OWN, withdrawn="")], "moved", "1.0.4", None),
        ([release("1.0.0", sha256=OWN, withdrawn="leaks")], "asks", "1.0.0", None),
    ],
)  # fmt: skip
def test_a_release_is_proposed_only_if_nothing_speaks_against_it(
    releases: list[Release], state: str, newest: str, younger: str | None
) -> None:
    """Newer, not withdrawn, not passed over, old enough, with a digest; the newest of those."""
    found = judge(*releases)
    assert (found.state, found.newest, found.younger) == (state, newest, younger)


def test_a_file_that_was_exchanged_and_a_release_that_was_withdrawn_are_said_in_words() -> None:
    """Both digests are named; what was withdrawn comes with the reason and what stands."""
    exchanged = judge(release("1.0.0", sha256=NEW))
    withdrawn = judge(
        release("1.0.0", sha256=OWN, withdrawn="leaks memory."), release("0.9.0", sha256=NEW)
    )

    assert NEW in exchanged.reason
    assert OWN in exchanged.reason
    assert exchanged.next_step.startswith("Compare with another index")
    assert withdrawn.reason == (
        "llama-cpp-python 1.0.0, which is declared, was withdrawn: leaks memory. The newest that "
        "stands is 0.9.0."
    )


def test_a_list_without_the_release_in_use_asks_instead_of_calling_it_the_newest() -> None:
    """A mirror that lags behind would otherwise be believed."""
    listing = Listing(said_by="The index", releases=(release("0.9.0"),), pins_digest=True)
    found = upstream_engines.judged(PIN, listing, before=None, now=NOW)
    assert found.state == "asks"
    assert "does not list the declared llama-cpp-python 1.0.0" in found.reason
    assert "The newest that stands is 0.9.0" in found.reason


def test_who_dates_a_commit_back_cannot_shorten_the_wait() -> None:
    """A time that an author chose counts only until a look has seen that it was not there."""
    ollama = {"is_authors_time": True, "sha256": None}
    pin = {"engine": "ollama", "sha256": None}
    own = release("1.0.0", 300, **ollama)
    listing = Listing(said_by="Go", releases=(own,))
    wanted = Pin(**({name: getattr(PIN, name) for name in PIN.__dataclass_fields__} | pin))

    def seen(*newer: Release, before: EngineUpstream | None, days: float) -> EngineUpstream:
        listed = Listing(said_by=listing.said_by, releases=(*newer, own))
        now = NOW + timedelta(days=days)
        return upstream_engines.judged(wanted, listed, before=before, now=now)

    new = release("1.0.1", 300, **ollama)
    first = seen(before=None, days=0)
    second = seen(new, before=first, days=1)
    third = seen(new, before=second, days=3.9)
    fourth = seen(new, before=third, days=4)
    without_memory = seen(new, before=None, days=1)

    assert [one.state for one in (first, second, third, fourth)] == [
        "current", "waiting", "waiting", "moved",
    ]  # fmt: skip
    # Nobody can know it at the first look of all.
    assert without_memory.state == "moved"


# --- Ollama -----------------------------------------------------------------------------------


def go_proxy(folder: Path, *versions: str, times: dict[str, str] | None = None) -> str:
    """Write a module proxy with these versions; return it for GOPROXY."""
    place = folder / "proxy" / MODULE / "@v"
    place.mkdir(parents=True)
    (place / "list").write_text("".join(f"v{one}\n" for one in versions))
    for one in versions:
        at = (times or {}).get(one, LONG_AGO)
        (place / f"v{one}.info").write_text(json.dumps({"Version": f"v{one}", "Time": at}))
        (place / f"v{one}.mod").write_text(
            f"module {MODULE}\n\ngo 1.{99 if one > '0.35' else 21}\n"
        )
    return f"file://{folder}/proxy"


def ollama(*before: EngineUpstream, now: datetime = NOW, **fields: Any) -> EngineUpstream:
    """Look for Ollama."""
    (found,) = look(declared(engine="auto", **fields), *before, now=now, engines=("ollama",))
    return found


@needs_go
def test_go_says_which_release_of_ollama_is_newest_and_when_it_was_tagged(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real Go, by its own GOPROXY; candidates for a release are none."""
    proxy = go_proxy(
        tmp_path, "0.9.9", "0.33.0", "0.34.2", "0.34.10", "0.34.11-rc1", "0.34.12",
        times={"0.34.12": "2026-11-22T01:00:00Z"},
    )  # fmt: skip
    machine.setenv("GOPROXY", proxy)

    found = ollama()

    assert (found.state, found.newest, found.younger) == ("moved", "0.34.10", "0.34.12")
    assert found.newest_at == datetime(2026, 8, 25, 22, 3, 57, tzinfo=UTC)
    assert found.versions_between == ("0.34.2",)
    assert found.sha256 is None
    assert found.reason == "Ollama 0.34.10 was tagged on 2026-08-25."
    assert not list(tmp_path.glob("go*"))


@needs_go
def test_a_mirror_that_lists_what_it_was_asked_for_does_not_make_an_old_release_the_newest(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The list of such a proxy ends long before the release in use."""
    machine.setenv("GOPROXY", go_proxy(tmp_path, "0.6.5", "0.17.4"))
    found = ollama()
    assert (found.state, found.newest) == ("unknown", None)
    assert "lists 2 releases of Ollama, up to 0.17.4, and not the declared 0.33.0" in found.reason
    assert "GITHUB_TOKEN is not set" in found.reason


@needs_go
def test_what_such_a_mirror_lists_beyond_is_proposed_and_said_to_be_a_lower_bound(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Newer is newer; the Go that it needs, and does not find here, is said, too."""
    machine.setenv("GOPROXY", go_proxy(tmp_path, "0.6.5", "0.36.0"))
    found = ollama()
    assert (found.state, found.newest) == ("moved", "0.36.0")
    assert found.notes[0].startswith("Ollama 0.36.0 needs Go 1.99 to be built, and Go 1.")
    assert "does not list the declared 0.33.0; there may be newer ones yet" in found.notes[1]


@needs_go
def test_go_that_reaches_nobody_is_unknown_and_shows_no_password(
    machine: pytest.MonkeyPatch,
) -> None:
    """An address of GOPROXY may hold one."""
    machine.setenv("GOPROXY", "http://bot:s3cret@127.0.0.1:1/t0ken")
    found = ollama()
    assert found.state == "unknown"
    assert "Go cannot say what is newest" in found.reason
    assert "s3cret" not in found.model_dump_json()
    assert "t0ken" not in found.model_dump_json()


@pytest.mark.parametrize("printed", ["echo '{'", "echo '[1]'", "echo nothing; exit 1", "sleep 30"])
def test_a_go_that_prints_nonsense_or_nothing_is_said_to_be_silent(
    tmp_path: Path, printed: str
) -> None:
    """A real Go cannot be made to print it."""
    go = tmp_path / "go"
    go.write_text(f"#!/bin/sh\n{printed}\n")
    go.chmod(0o755)
    with pytest.raises(go_versions.GoSilentError):
        go_versions.releases(MODULE, go, within_s=0.3)


@pytest.fixture
def github(index: Index, machine: pytest.MonkeyPatch, tmp_path: Path) -> Index:
    """A machine without Go, with a token for a GitHub."""
    machine.setattr(ollama_install, "_USUAL_GO", tmp_path / "none")
    machine.setenv("PATH", "/nowhere")
    machine.setenv("GITHUB_TOKEN", "ghs_0")
    machine.setenv("GITHUB_API_URL", index.url)
    return index


def on_github(version: str, sha256: str | None = None, **fields: Any) -> dict[str, Any]:
    """A release, with two files if it has digests."""
    assets = [
        {"name": name, "size": 1_000, "digest": f"sha256:{digest}"}
        for name, digest in (("ollama-linux-arm64.tar.zst", "9" * 64), ("ollama-linux.zst", sha256))
        if digest
    ]
    return {
        "tag_name": f"v{version}", "draft": False, "prerelease": False,
        "published_at": LONG_AGO, "assets": assets, **fields,
    }  # fmt: skip


def tell(github: Index, *releases: dict[str, Any]) -> None:
    """Let GitHub have these releases of Ollama."""
    body = json.dumps(list(releases)).encode()
    github.answers["/repos/ollama/ollama/releases"] = Answer(kind="application/json", body=body)


def test_without_go_the_releases_are_those_of_github(github: Index) -> None:
    """Drafts and pre-releases are none, whatever their tag says; the time is GitHub's."""
    tell(
        github, on_github("0.35.0", prerelease=True), on_github("0.34.9", draft=True),
        on_github("0.34.2"), on_github("0.34.3-rc0"), on_github("0.33.0"),
    )  # fmt: skip
    found = ollama()
    assert (found.state, found.newest) == ("moved", "0.34.2")
    assert found.reason == "Ollama 0.34.2 was released on 2026-08-25."


def test_where_an_archive_is_pinned_the_new_one_s_digest_comes_with_the_release(
    github: Index,
) -> None:
    """It is that of the file of the same name as the one whose digest is declared."""
    tell(github, on_github("0.34.2", NEW), on_github("0.33.0", OWN))
    found = ollama(archive=OWN)
    tell(github, on_github("0.34.2"), on_github("0.33.0", OWN))
    without = ollama(archive=OWN)
    tell(github, on_github("0.34.2", NEW), on_github("0.33.0", "8" * 64))
    another = ollama(archive=OWN)
    tell(github, on_github("0.33.0", "8" * 64))
    exchanged = ollama(archive=OWN)

    assert (found.state, found.newest, found.sha256) == ("moved", "0.34.2", NEW)
    assert found.size_bytes == 1_000
    assert [without.state, another.state, exchanged.state] == ["asks", "asks", "asks"]
    assert f"declared is {OWN}" in exchanged.reason


def test_with_neither_go_nor_a_token_both_are_said(
    github: Index, machine: pytest.MonkeyPatch
) -> None:
    """Nobody is asked."""
    machine.delenv("GITHUB_TOKEN")
    found = ollama()
    assert found.state == "unknown"
    assert "Go is not installed" in found.reason
    assert "GITHUB_TOKEN is not set" in found.reason
    assert [path for path, _ in github.asked if "repos" in path] == []


# --- what is looked at ------------------------------------------------------------------------


def test_an_engine_that_hangs_holds_up_neither_the_other_nor_the_end(
    machine: pytest.MonkeyPatch,
) -> None:
    """Such as a resolver of names that knows no deadline: it is unknown, and nobody waits."""
    hung = threading.Event()

    def listing(pin: Pin, *_: object) -> Listing:
        if pin.engine == "llama.cpp":
            hung.wait(30)
        return Listing(said_by="Go", releases=(Release(version="0.33.0"),))

    machine.setattr("pipelines.engine_releases.listing_of", listing)
    found = look(declared(engine="auto"), within_s=0.3)
    left = [one for one in threading.enumerate() if one.name == "engines"]
    hung.set()

    assert [one.state for one in found] == ["unknown", "current"]
    assert "did not answer in the time" in found[0].reason
    assert [one.daemon for one in left] == [True]


def test_only_engines_in_use_are_looked_at(index: Index) -> None:
    """Where llama-server serves, nobody asks for Ollama; where the watch is off, for nothing."""
    assert [pin.engine for pin in pins_of(declared())] == ["llama.cpp"]
    assert [pin.engine for pin in pins_of(declared(engine="ollama"))] == ["llama.cpp", "ollama"]
    assert look(declared(engines=False)) == ()
    assert look(declared(), engines=("ollama",)) == ()
    assert index.asked == []


def test_what_the_declaration_passes_over_is_each_engine_s_own() -> None:
    """By the key that pins it."""
    ignore = IgnoredReleases(llama_cpp_python=("0.3.36",), ollama=("0.34.0",))
    pins = pins_of(declared(engine="auto", ignore=ignore, cooldown_days=9))
    assert [pin.ignored for pin in pins] == [("0.3.36",), ("0.34.0",)]
    assert [pin.version for pin in pins] == ["0.3.33", "0.33.0"]
    assert [pin.cooldown_days for pin in pins] == [9, 9]
