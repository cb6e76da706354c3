"""The engine: which program serves, whence it came, and what a record says of it."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ollama_stand_ins
import pytest

from pipelines import hashing
from pipelines.errors import MachineError, ParamsError, ToolError
from pipelines.params import Serving
from pipelines.serving import engine as engines
from pipelines.serving import ollama_install

if TYPE_CHECKING:
    from pipelines.serving.engine import Engine
    from pipelines.toolchain import Toolchain


def find(tools: Toolchain, tmp_path: Path, **serving: Any) -> Engine:
    """Find what `serving` declares."""
    return engines.find(Serving(**serving), tools, log=tmp_path / "log")


def on_path(monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
    """Put the directory of a program in front of PATH."""
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache, and neither Ollama nor Go nor a compiler."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ollama_install, "_USUAL_GO", Path("/nowhere/go"))
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("tar", "zstd", "sh"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    return programs


# --- the real ones ------------------------------------------------------------------------------


def test_the_real_ollama_says_its_version_and_the_llama_cpp_that_runs_in_it(engine: Engine) -> None:
    """Both are in the record: an Ollama's version alone does not name the code that computes."""
    assert engine.id.kind == "ollama"
    assert engine.id.declared
    assert engine.ollama is not None
    assert engines.llama_server_of(engine.ollama) == engine.llama_server
    assert engine.id.version in engine.id.sentence
    assert engine.id.llama_cpp in engine.id.sentence


def test_the_ollama_built_by_go_runs_the_benchmarks_llama_cpp(
    engine: Engine, tools: Toolchain
) -> None:
    """Bench and server are one commit, so that the one's numbers speak of the other."""
    if engine.id.found_by == "PATH":
        pytest.skip("this machine has an Ollama of its own")
    assert engine.id.found_by == "go install"
    assert engine.id.version == Serving().ollama
    assert engine.llama_server == tools.tool("llama-server").resolve()
    assert tools.commit[:9] in engine.id.llama_cpp
    assert "the llama.cpp of the benchmarks" in engine.id.sentence


def test_an_ollama_on_path_is_taken(
    engine: Engine, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what this machine's operator serves with; links to it are followed as it does."""
    assert engine.ollama is not None
    link = tmp_path / "bin" / "ollama"
    link.parent.mkdir()
    link.symlink_to(engine.ollama)
    on_path(monkeypatch, link)

    found = find(tools, tmp_path)

    assert (found.id.found_by, found.ollama) == ("PATH", link)
    assert (found.id.version, found.llama_server) == (engine.id.version, engine.llama_server)


def test_the_version_is_the_program_s_not_that_of_a_server_that_runs(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ollama --version` asks the server of $OLLAMA_HOST and would print its version."""
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "version").write_text('{"version": "0.1.2"}')
    assert engine.ollama is not None
    with ollama_stand_ins.serving(tmp_path) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)

        version = ollama_install.version_of(engine.ollama, tmp_path / "log")

    assert version == engine.id.version
    assert server.asked == []


def test_llama_server_is_an_engine_if_it_is_declared(
    tools: Toolchain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then it is no stand-in, and Ollama is not even looked for."""
    found = find(tools, tmp_path, engine="llama-server")

    assert found.ollama is None
    assert found.llama_server == tools.tool("llama-server")
    assert (found.id.kind, found.id.found_by) == ("llama-server", "toolchain")
    assert found.id.declared
    assert tools.commit[:9] in found.id.llama_cpp
    assert not capsys.readouterr().err


# --- an Ollama on PATH that is not as it should be ----------------------------------------------


@pytest.mark.parametrize("version", ["0.24.0", "0.29.9", "0.12.3-rc1"])
def test_an_ollama_that_is_too_old_is_refused_with_the_supported_range(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """It has no llama-server: nothing that a record says of the engine would be true."""
    on_path(monkeypatch, ollama_stand_ins.old_style(tmp_path, version))

    with pytest.raises(MachineError, match=r"too old: supported is 0\.30\.0 or later") as caught:
        find(tools, tmp_path)

    assert version in caught.value.message
    assert "remove it from PATH" in caught.value.hint


@pytest.mark.parametrize("version", ["0.34.0", "0.41.2", "1.0.0"])
def test_an_ollama_that_is_newer_than_what_was_run_is_taken_with_a_warning(
    tools: Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
) -> None:
    """Its speed is its speed, and each load proves what is served; the record says it as well."""
    on_path(monkeypatch, ollama_stand_ins.old_style(tmp_path, version))

    found = find(tools, tmp_path)

    assert found.id.version == version
    for said in (capsys.readouterr().err, found.id.sentence):
        assert f"Ollama {version} is newer than what was run here" in said
        assert "0.30.0 or later, run up to 0.33" in said


@pytest.mark.parametrize("version", ["0.30.0", "0.33.5-rc2"])
def test_an_ollama_within_the_range_needs_no_word(
    tools: Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
) -> None:
    """Only that its llama.cpp is another one than that of the benchmarks is in the record."""
    on_path(monkeypatch, ollama_stand_ins.old_style(tmp_path, version))

    found = find(tools, tmp_path)

    assert not capsys.readouterr().err
    assert found.id.llama_cpp == "10488 (abcdef123)"
    assert f"another llama.cpp than the benchmarks' {tools.commit[:9]}" in found.id.sentence


def test_an_ollama_that_was_built_without_a_version_is_refused(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare `go install` makes a 0.0.0."""
    on_path(monkeypatch, ollama_stand_ins.old_style(tmp_path, "0.0.0"))

    with pytest.raises(MachineError, match="built without one"):
        find(tools, tmp_path)


def test_an_ollama_without_its_llama_server_is_refused(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would start, answer at /api/version, and fail at the first load."""
    program = ollama_stand_ins.old_style(tmp_path, "0.33.0", with_server=False)
    on_path(monkeypatch, program)

    with pytest.raises(MachineError, match="has no llama-server") as caught:
        find(tools, tmp_path)

    assert str(tmp_path / "lib/ollama/llama-server") in caught.value.message


@pytest.mark.parametrize("body", ["sys.exit(3)", "print('hello')", "sys.exit('exec format error')"])
def test_an_ollama_that_does_not_run_is_no_reason_to_take_another_in_silence(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """What is broken on this machine is said."""
    on_path(monkeypatch, ollama_stand_ins.script(tmp_path / "bin" / "ollama", body))

    with pytest.raises(ToolError, match="ollama"):
        find(tools, tmp_path)


def test_a_llama_server_that_does_not_run_is_said(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing library shows here, not after the load of 20 GB."""
    program = ollama_stand_ins.old_style(tmp_path, "0.33.0")
    ollama_stand_ins.script(tmp_path / "lib/ollama/llama-server", "sys.exit(127)")
    on_path(monkeypatch, program)

    with pytest.raises(ToolError, match="llama-server ended with exit code 127"):
        find(tools, tmp_path)


# --- no Ollama on PATH --------------------------------------------------------------------------


@pytest.mark.usefixtures("bare")
def test_with_neither_ollama_nor_go_the_llama_server_stands_in_and_says_so_loudly(
    tools: Toolchain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it measures is real and promotes nothing: it was not declared."""
    found = find(tools, tmp_path)

    said = capsys.readouterr().err
    assert "Install Ollama, or Go" in said
    assert "declare serving.engine: llama-server" in said
    assert "warning: Ollama was not found and cannot be installed" in said
    for text in (said, found.id.sentence):
        assert "PATH: no ollama." in text
        assert "go install: Go is not installed" in text
        assert "release archive: No sha256 of Ollama's release archive is declared" in text
    assert (found.id.kind, found.id.declared) == ("llama-server", False)
    assert "\n" not in found.id.sentence


@pytest.mark.usefixtures("bare")
def test_a_failed_installation_is_in_the_record_without_directories_of_this_machine(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are for everybody to read."""

    def fails(*_: object, **__: object) -> Path:
        cache = ollama_install.cache_root()
        raise MachineError(
            f"the disk filled up while {cache}/x in {Path.home()} was written.\nMore."
        )

    monkeypatch.setattr(ollama_install, "with_go", fails)

    sentence = find(tools, tmp_path).id.sentence

    assert "go install: the disk filled up while the cache/x in ~ was written." in sentence
    assert "More" not in sentence


@pytest.mark.usefixtures("bare")
def test_a_declared_ollama_that_cannot_be_had_is_an_error_with_the_next_step(
    tools: Toolchain, tmp_path: Path
) -> None:
    """Nothing stands in for what was declared."""
    with pytest.raises(MachineError, match=r"No Ollama can be had\. PATH: no ollama\.") as caught:
        find(tools, tmp_path, engine="ollama")

    assert "Go is not installed" in caught.value.message
    assert "Install Ollama (0.30.0 or later" in caught.value.hint


@pytest.mark.usefixtures("bare")
def test_without_go_the_release_archive_is_taken_if_its_sha256_is_declared(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is Ollama, and the one that was declared."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # tar wants its own helpers
    archive = ollama_stand_ins.release(tmp_path / "releases", "ollama-linux-amd64.tar.zst")
    with ollama_stand_ins.serving(tmp_path / "releases") as server:
        monkeypatch.setattr(ollama_install, "RELEASES", server.url)
        found = find(tools, tmp_path, ollama_archive_sha256=hashing.digest(archive).sha256)

    assert (found.id.kind, found.id.found_by) == ("ollama", "release archive")
    assert found.id.declared
    assert found.id.llama_cpp == "10488 (abcdef123)"


@pytest.mark.parametrize("engine_word", ["auto", "ollama"])
def test_a_pinned_ollama_that_is_too_old_is_a_mistake_in_the_declaration(
    tools: Toolchain, tmp_path: Path, engine_word: str
) -> None:
    """Before anything is looked for or downloaded."""
    with pytest.raises(ParamsError, match=r"serving\.ollama: Ollama 0\.24\.0 is too old"):
        find(tools, tmp_path, engine=engine_word, ollama="0.24.0")
