"""The pull request of a newer engine: what changes together, what it says, what it never takes."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sample import SAMPLE

from pipelines import bump_engine, declaration, pin_lines
from pipelines.layout import Layout
from pipelines.params import CheckUpstream, Declaration, IgnoredReleases
from pipelines.upstream_records import EngineUpstream, UpstreamRecord

ROOT = Path(__file__).resolve().parent.parent
AT = Layout(SAMPLE)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
NEW = "c" * 64


@cache
def fleet() -> Declaration:
    """What the sample declares: llama-cpp-python 0.3.36 and Ollama 0.33.0."""
    return declaration.load(AT.params)


def declared(**serving: Any) -> Declaration:
    """The same, served in another way."""
    return fleet().model_copy(update={"serving": fleet().serving.model_copy(update=serving)})


def llama(**fields: Any) -> EngineUpstream:
    """A newer llama.cpp, as a look found it."""
    return EngineUpstream(
        **{
            "engine": "llama.cpp", "pinned": fleet().toolchain.llama_cpp_python,
            "newest": "0.3.38", "sha256": NEW, "size_bytes": 76_589_250,
            "newest_at": datetime(2026, 11, 1, 5, 48, tzinfo=UTC), "state": "moved",
            "versions_between": ("0.3.37",), "reason": "It came.", **fields,
        }
    )  # fmt: skip


def ollama(**fields: Any) -> EngineUpstream:
    """A newer Ollama, as a look found it."""
    return EngineUpstream(
        **{
            "engine": "ollama", "pinned": fleet().serving.ollama, "newest": "0.34.1",
            "state": "moved", "reason": "It came.", **fields,
        }
    )  # fmt: skip


def record(*engines: EngineUpstream) -> UpstreamRecord:
    """What a look found."""
    return UpstreamRecord(checked_at=NOW, requests_count=1, models=(), engines=engines)


def plan(*engines: EngineUpstream, wanted: Declaration | None = None, **more: Any) -> Any:
    """What is proposed."""
    return bump_engine.plan(AT, wanted or fleet(), record(*engines), **more)


def test_the_version_of_llama_cpp_and_its_digest_change_together_and_nothing_else(
    tmp_path: Path,
) -> None:
    """One without the other could not be built; not a byte beside them changes."""
    (bump,) = plan(llama())
    params = tmp_path / "params.yaml"
    params.write_bytes(AT.params.read_bytes())

    pin_lines.write(params, bump.edits)

    before, after = AT.params.read_text().splitlines(), params.read_text().splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [
        ("  llama_cpp_python: 0.3.36", "  llama_cpp_python: 0.3.38"),
        (f"  sha256: {fleet().toolchain.sha256}", f"  sha256: {NEW}"),
    ]
    loaded = declaration.load(params).toolchain
    assert (loaded.llama_cpp_python, loaded.sha256) == ("0.3.38", NEW)
    assert (bump.branch, bump.title) == (
        "bump/llama.cpp", "llama.cpp: llama-cpp-python 0.3.36 → 0.3.38",
    )  # fmt: skip
    assert bump.labels == ("bump", "bump: engine")
    assert bump.marker == "<!-- fleet:bump llama.cpp 0.3.36..0.3.38 -->"


def test_ollama_changes_alone_or_with_the_digest_of_the_archive_where_one_is_declared() -> None:
    """A version with the digest of another one would be refused on every runner without Go."""
    (alone,) = plan(ollama())
    (both,) = plan(ollama(sha256=NEW), wanted=declared(ollama_archive_sha256="b" * 64))
    assert alone.edits == {("serving", "ollama"): "0.34.1"}
    assert both.edits == alone.edits | {("serving", "ollama_archive_sha256"): NEW}
    assert (alone.branch, alone.title) == ("bump/ollama", "Ollama 0.33.0 → 0.34.1")


@pytest.mark.parametrize(
    "found",
    [
        llama(state="waiting"), llama(state="asks"), llama(state="ignored"),
        llama(newest=None), llama(newest="0.3.35"), llama(newest="0.3.36"),
        llama(newest="0.4"), llama(newest="0.3.37rc1"), llama(newest="9.9.9 --evil"),
        llama(sha256=None), llama(pinned="0.3.30"), llama(newest="0.3.40"),
        ollama(newest="0.33.0"),
    ],
    ids=lambda found: f"{found.state}-{found.pinned}-{found.newest}",
)  # fmt: skip
def test_what_a_look_may_not_propose_is_not_taken_from_any_file(found: EngineUpstream) -> None:
    """A record may come as an artifact: no older release, no other text, no missing digest."""
    watch = CheckUpstream(ignore=IgnoredReleases(llama_cpp_python=("0.3.40",)))
    wanted = fleet().model_copy(update={"check_upstream": watch})
    assert plan(found, wanted=wanted) == ()


def test_only_engines_that_were_asked_for_and_are_in_use_are_proposed() -> None:
    """Where llama-server serves, Ollama is nobody's."""
    both = (llama(), ollama())
    assert [bump.subject for bump in plan(*both)] == ["llama.cpp", "ollama"]
    assert [bump.subject for bump in plan(*both, engines=("ollama",))] == ["ollama"]
    served = plan(*both, wanted=declared(engine="llama-server"))
    assert [bump.subject for bump in served] == ["llama.cpp"]


def test_the_body_says_what_is_made_again_and_what_it_costs_for_all_models() -> None:
    """Everything but the files of upstream, of every model; what nobody knows is said."""
    text = plan(llama())[0].text()
    for words in (
        "0.3.36 → 0.3.38 |",
        "2026-11-01 05:48 UTC; 3 days of waiting are over",
        "| **Releases between** | 0.3.37 |",
        f"`{NEW}`, 73.0 MiB, as the package index says",
        "convert, verify, calibrate, quantize (5), benchmark (5), evaluate, choose, load-test",
        "on runners",
        "on the same GGUF",
        "Releases that `stable` means",
        "requirements.lock",
        "close this, and 0.3.38 is not proposed again",
        "`check_upstream.ignore.llama_cpp_python`",
        "**Rollback**",
        "/compare/v0.3.36...v0.3.38)",
    ):
        assert words in text
    assert "fetch" not in text.partition("To run again")[2].partition("|")[0]
    assert text == plan(llama())[0].text()


def test_the_body_of_ollama_says_that_no_gguf_is_made_again() -> None:
    """The server below it stays that of the toolchain."""
    text = plan(ollama(), waits=True)[0].text()
    assert "| **To run again** | load-test, of 1 model |" in text
    assert "No GGUF depends on it" in text
    assert "`check_upstream.ignore.ollama`" in text
    assert "**The checks wait for a click.**" in text


def test_what_an_index_says_cannot_write_to_the_page() -> None:
    """Its words come into the notes of a look; none becomes a mention, a link, a picture."""
    foreign = "<img src=x> @octocat ![p](http://evil.invalid/p) [l](http://evil.invalid) `x` | y"
    between = ("0.3.37", "[l](http://evil.invalid)", "@octocat")
    text = plan(llama(notes=(foreign,), versions_between=between))[0].text()
    told = text.replace("&#64;", "").replace("@\u200b", "")
    assert "<img" not in text
    assert "@octocat" not in told
    assert "](http://evil" not in text
    assert "| **Releases between** | 0.3.37 |" in text


def test_a_body_keeps_to_its_limit_whatever_a_look_holds() -> None:
    """GitHub takes 65,536 characters."""
    found = llama(notes=tuple("x" * 1990 for _ in range(20)))
    assert len(plan(found)[0].text()) <= 60_000
    assert len(plan(found)[0].text(3_000)) <= 3_000
