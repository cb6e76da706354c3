"""Ollama installed where there is none: once, whole or not at all, by Go or from an archive."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import ollama_stand_ins
import psutil
import pytest

from pipelines import atomic, console, hashing, proc
from pipelines.errors import DigestError, MachineError, ParamsError, ToolError
from pipelines.serving import engine as engines
from pipelines.serving import ollama_install as install
from pipelines.toolchain import Toolchain, open_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ollama_stand_ins import Server

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.33.0"
ARCHIVE = "ollama-linux-amd64.tar.zst"
# What another process types: the same installation, from the same cache.
PROGRAM = """\
import sys
from pathlib import Path
from pipelines.serving import ollama_install
from pipelines.toolchain import open_prefix
print(ollama_install.with_go("0.33.0", open_prefix(Path(sys.argv[1])), log=Path(sys.argv[2])))
"""


@pytest.fixture(scope="session")
def warm_go_cache(tmp_path_factory: pytest.TempPathFactory, tools: Toolchain) -> Path:
    """Go's own runtime, compiled once: 5 s that every further installation here does without."""
    folder = tmp_path_factory.mktemp("go")
    kept = folder / "kept"
    real = atomic.remove

    def keep(path: Path) -> None:
        if path.name.endswith(".build"):
            shutil.copytree(path / "cache", kept)
        real(path)

    with (
        pytest.MonkeyPatch.context() as patch,
        ollama_stand_ins.serving(ollama_stand_ins.go_proxy(folder / "proxy")) as server,
    ):
        patch.setenv("GGUF_FLEET_CACHE", str(folder / "cache"))
        patch.setenv("GOPROXY", server.url)
        patch.setenv("GOSUMDB", "off")
        patch.setattr(atomic, "remove", keep)
        install.with_go(VERSION, tools, log=folder / "log")
    return kept


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm_go_cache: Path) -> Path:
    """An empty cache of ours, but for the compiled runtime of Go."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(folder))
    monkeypatch.setenv("GOSUMDB", "off")
    monkeypatch.delenv("GOTOOLCHAIN", raising=False)
    shutil.copytree(warm_go_cache, folder / "ollama" / f"{VERSION}-go.build" / "cache")
    return folder / "ollama"


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A module proxy that has a small Ollama."""
    folder = ollama_stand_ins.go_proxy(tmp_path / "proxy")
    with ollama_stand_ins.serving(folder) as server:
        monkeypatch.setenv("GOPROXY", server.url)
        yield server


def names(folder: Path) -> set[str]:
    """What is in a folder, locks and logs apart."""
    return {path.name for path in folder.iterdir() if path.suffix not in {".lock", ".owner"}}


def start(tools: Toolchain, tmp_path: Path) -> subprocess.Popen[str]:
    """Install in a process of its own, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tools.prefix, tmp_path / "other.log"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def fake_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a Python program in the place of Go."""
    ollama_stand_ins.script(tmp_path / "bin" / "go", body)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setattr(install, "_USUAL_GO", tmp_path / "bin" / "go")


# --- by Go ----------------------------------------------------------------------------------------


def test_go_builds_it_beside_the_toolchain_s_llama_server(
    cache: Path, proxy: Server, tools: Toolchain, tmp_path: Path
) -> None:
    """The layout is the one in which Ollama finds its helpers; Go's own caches are gone."""
    program = install.with_go(VERSION, tools, log=tmp_path / "log")

    assert install.version_of(program, tmp_path / "log") == VERSION
    assert not program.is_symlink()
    assert engines.llama_server_of(program) == tools.tool("llama-server").resolve()
    assert names(cache) == {f"{VERSION}-go", f"{VERSION}-go-{tools.prefix.name}"}
    # No directory of this machine is in the program.
    assert str(cache).encode() not in program.read_bytes()
    assert proxy.asked


def test_an_installed_one_is_not_installed_again(
    cache: Path, proxy: Server, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load test asks for it: it costs a few stats, and no program is started."""
    first = install.with_go(VERSION, tools, log=tmp_path / "log")
    asked = len(proxy.asked)
    monkeypatch.setattr(proc, "run", lambda *_a, **_k: pytest.fail("a program was started"))

    assert install.with_go(VERSION, tools, log=tmp_path / "log") == first
    assert len(proxy.asked) == asked
    assert cache.is_dir()


def test_another_toolchain_gets_a_layout_of_its_own_without_another_build(
    cache: Path, proxy: Server, tools: Toolchain, tmp_path: Path
) -> None:
    """Server and benchmark stay the same llama.cpp when the pin moves."""
    install.with_go(VERSION, tools, log=tmp_path / "log")
    asked = len(proxy.asked)
    moved = tmp_path / "cpu-other"
    shutil.copytree(tools.prefix, moved, copy_function=os.link, symlinks=True)
    other = open_prefix(moved)
    assert other is not None

    program = install.with_go(VERSION, other, log=tmp_path / "log")

    assert engines.llama_server_of(program) == moved / "bin" / "llama-server"
    assert len(proxy.asked) == asked
    assert f"{VERSION}-go-cpu-other" in names(cache)


@pytest.mark.parametrize(
    "damage", ["no link", "other link", "no program", "cut program", "no mark"]
)
@pytest.mark.usefixtures("proxy")
def test_a_damaged_installation_is_made_again(
    cache: Path, tools: Toolchain, tmp_path: Path, warm_go_cache: Path, damage: str
) -> None:
    """Half an Ollama would start, and fail at the first load."""
    program = install.with_go(VERSION, tools, log=tmp_path / "log")
    layout = program.parent.parent
    if "link" in damage:
        (layout / "lib/ollama").unlink()
    if damage == "other link":
        (layout / "lib/ollama").symlink_to(tmp_path)
    if damage == "no program":
        program.unlink()
    if damage == "cut program":
        os.truncate(program, 1000)  # a hard link: the built one is cut as well
        shutil.copytree(warm_go_cache, cache / f"{VERSION}-go.build" / "cache")
    if damage == "no mark":
        (layout / "complete").unlink()

    assert install.with_go(VERSION, tools, log=tmp_path / "log") == program
    assert install.version_of(program, tmp_path / "log") == VERSION
    assert engines.llama_server_of(program) == tools.tool("llama-server").resolve()


def test_two_at_once_install_it_once(
    cache: Path, proxy: Server, tools: Toolchain, tmp_path: Path
) -> None:
    """The second says whom it waits for, and takes what the first has made."""
    proxy.stall = ".zip"
    first = start(tools, tmp_path)
    assert proxy.stalled.wait(60)
    second = start(tools, tmp_path)
    assert second.stderr is not None
    said = second.stderr.readline()
    proxy.go_on.set()
    outputs = [process.communicate(timeout=120)[0].strip() for process in (first, second)]

    assert f"Waiting for process {first.pid} on" in said
    assert f"installing Ollama {VERSION}" in said
    assert (first.returncode, second.returncode) == (0, 0)
    assert outputs[0] == outputs[1]
    assert sum(path.endswith(".zip") for path in proxy.asked) == 1
    assert names(cache) == {f"{VERSION}-go", f"{VERSION}-go-{tools.prefix.name}"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_in_the_middle_leaves_nothing_under_a_final_name_and_the_next_run_goes_on(
    cache: Path,
    proxy: Server,
    tools: Toolchain,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """And Go, which was waiting for its download, is gone as well."""
    proxy.stall = ".zip"
    killed = start(tools, tmp_path)
    assert proxy.stalled.wait(60)
    go = psutil.Process(killed.pid).children(recursive=True)
    os.kill(killed.pid, number)
    killed.communicate(timeout=30)
    assert go
    assert psutil.wait_procs(go, timeout=10)[1] == []
    left = names(cache)
    proxy.stall = ""
    proxy.go_on.set()

    program = install.with_go(VERSION, tools, log=tmp_path / "log")

    assert killed.returncode != 0
    assert not left & {f"{VERSION}-go", f"{VERSION}-go-{tools.prefix.name}"}
    assert install.version_of(program, tmp_path / "log") == VERSION
    assert names(cache) == {f"{VERSION}-go", f"{VERSION}-go-{tools.prefix.name}"}


@pytest.mark.usefixtures("cache")
def test_progress_is_shown_while_go_is_silent(
    proxy: Server,
    tools: Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line each 15 s, here each 0.1 s: a download that hangs is seen to hang."""
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_PLAIN_LINES", 0.1)
    proxy.stall = ".zip"
    process = threading.Timer(1.5, proxy.go_on.set)
    process.start()

    install.with_go(VERSION, tools, log=tmp_path / "log")

    lines = [line for line in capsys.readouterr().err.splitlines() if "Installing" in line]
    assert "once per version" in lines[0]
    assert len([line for line in lines if "downloading" in line]) >= 3


def test_go_writes_nothing_outside_our_cache(
    cache: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves when it is killed, objects in temporary directories too, is ours to remove."""
    seen = tmp_path / "seen"
    wanted = ("GOPATH", "GOMODCACHE", "GOCACHE", "GOTMPDIR", "TMPDIR", "GOBIN")
    body = f"""
assert os.path.isdir(os.environ["GOTMPDIR"])
open({str(seen)!r}, "w").write("\\n".join(os.environ[name] for name in {wanted!r}))
sys.exit("go: cannot")
"""
    fake_go(tmp_path, monkeypatch, body)

    with pytest.raises(ToolError, match="go: cannot"):
        install.with_go(VERSION, tools, log=tmp_path / "log")

    places = seen.read_text().splitlines()
    assert len(places) == len(wanted)
    assert all(Path(place).is_relative_to(cache) for place in places)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("declared", [None, "auto"])
def test_go_downloads_no_other_go_unless_the_user_says_so(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: str | None
) -> None:
    """GOTOOLCHAIN is local unless it is set; the user's module settings stay theirs."""
    seen = tmp_path / "seen"
    body = f"""
open({str(seen)!r}, "w").write(os.environ["GOTOOLCHAIN"] + " " + os.environ["GOPROXY"])
sys.exit("go: cannot")
"""
    fake_go(tmp_path, monkeypatch, body)
    monkeypatch.setenv("GOPROXY", "https://proxy.example.invalid")
    if declared:
        monkeypatch.setenv("GOTOOLCHAIN", declared)

    with pytest.raises(ToolError, match="go: cannot"):
        install.with_go(VERSION, tools, log=tmp_path / "log")

    assert seen.read_text() == f"{declared or 'local'} https://proxy.example.invalid"


# --- what Go cannot do ----------------------------------------------------------------------------


@pytest.mark.usefixtures("cache")
def test_a_go_that_is_too_old_is_said_with_the_one_that_is_wanted(
    tools: Toolchain, tmp_path: Path, proxy: Server
) -> None:
    """By the real Go, which never downloads another one by itself."""
    ollama_stand_ins.go_proxy(tmp_path / "proxy", go="1.99.0")

    with pytest.raises(
        MachineError,
        match=r"Go 1\.\d+\.\d+ is too old to build Ollama 0\.33\.0, which wants Go 1\.99",
    ) as caught:
        install.with_go(VERSION, tools, log=tmp_path / "log")

    assert "GOTOOLCHAIN=auto" in caught.value.hint
    assert not [path for path in proxy.asked if "toolchain" in path]


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("body", ["print('go version go1.19.8 linux/amd64')", "sys.exit(1)"])
def test_an_old_go_on_path_does_not_hide_a_newer_one_in_its_usual_place(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Server, body: str
) -> None:
    """A service has the PATH of the system, and /usr/bin/go is what the distribution had."""
    real = shutil.which("go") or str(install._USUAL_GO)
    fake_go(tmp_path, monkeypatch, body)
    monkeypatch.setattr(install, "_USUAL_GO", Path(real))

    program = install.with_go(VERSION, tools, log=tmp_path / "log")

    assert install.version_of(program, tmp_path / "log") == VERSION
    assert proxy.asked


@pytest.mark.usefixtures("cache")
def test_a_go_that_cannot_even_read_the_module_is_too_old(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.21 Go had no patch releases in go.mod; these are its words."""
    said = "go: parsing go.mod: go.mod:3: invalid go version '1.26.0': must match format 1.23"
    fake_go(tmp_path, monkeypatch, f"sys.exit({said!r})")

    with pytest.raises(
        MachineError, match=r"too old to build Ollama 0\.33\.0, which wants Go 1\.26"
    ):
        install.with_go(VERSION, tools, log=tmp_path / "log")


@pytest.mark.parametrize("way", ["go", "archive"])
def test_a_cache_that_cannot_be_written_is_said(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Here a file lies where the directory would be."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    log = tmp_path / "log"
    ways = {
        "go": lambda: install.with_go(VERSION, tools, log=log),
        "archive": lambda: install.from_archive(VERSION, "0" * 64, log=log),
    }

    with pytest.raises(MachineError, match="Not a directory"):
        ways[way]()


@pytest.mark.usefixtures("proxy")
def test_a_version_that_does_not_exist_is_a_mistake_in_the_declaration(
    cache: Path, tools: Toolchain, tmp_path: Path
) -> None:
    """No fallback hides it."""
    with pytest.raises(ParamsError, match=r"serving\.ollama: Go finds no Ollama 0\.33\.99"):
        install.with_go("0.33.99", tools, log=tmp_path / "log")
    assert "0.33.99-go" not in names(cache)


@pytest.mark.usefixtures("cache")
def test_no_network_is_said(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens at port 1."""
    monkeypatch.setenv("GOPROXY", "http://127.0.0.1:1")

    with pytest.raises(MachineError, match="module proxy is out of reach"):
        install.with_go(VERSION, tools, log=tmp_path / "log")


@pytest.mark.parametrize(
    ("missing", "words"), [(("gcc", "cc", "clang"), "C compiler"), (("g++", "c++"), r"C\+\+ comp")]
)
@pytest.mark.usefixtures("cache")
def test_a_missing_compiler_is_said_before_anything_is_downloaded(  # noqa: PLR0913, PLR0917
    tools: Toolchain,
    tmp_path: Path,
    proxy: Server,
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, ...],
    words: str,
) -> None:
    """Go would say it after minutes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in {"go", "gcc", "g++"} - set(missing):
        found = shutil.which(name) or str(install._USUAL_GO)
        (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(MachineError, match=words) as caught:
        install.with_go(VERSION, tools, log=tmp_path / "log")

    assert "apt-get install g++" in caught.value.hint
    assert proxy.asked == []


def test_a_full_disk_is_said_before_the_build_and_in_it(
    cache: Path, tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: Server
) -> None:
    """Before, by counting; in it, by what Go says, which a disk of a test cannot be made to say."""
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=10 << 20)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(MachineError, match=r"needs 1\.5 GiB in the cache; 0\.0 GiB are free"):
            install.with_go(VERSION, tools, log=tmp_path / "log")
    said = "write $WORK/b001/_pkg_.a: no space left on device"
    fake_go(tmp_path, monkeypatch, f"sys.exit({said!r})")
    with pytest.raises(MachineError, match="The disk filled up while Ollama"):
        install.with_go(VERSION, tools, log=tmp_path / "log")

    assert names(cache) <= {f"{VERSION}-go.build"}
    assert proxy.asked == []


@pytest.mark.usefixtures("cache")
def test_a_module_with_other_bytes_than_the_checksum_database_lists_is_refused(
    tools: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go checks; its words are those of cmd/go/internal/modfetch."""
    said = "verifying module: checksum mismatch\\n\\nSECURITY ERROR\\nThis download does NOT match"
    fake_go(tmp_path, monkeypatch, f'sys.exit("{said}")')

    with pytest.raises(DigestError, match="SECURITY ERROR"):
        install.with_go(VERSION, tools, log=tmp_path / "log")


def test_a_program_that_is_another_version_is_not_kept(
    cache: Path, tools: Toolchain, tmp_path: Path, proxy: Server
) -> None:
    """Records would name a version that did not serve."""
    ollama_stand_ins.go_proxy(tmp_path / "proxy", stamp=False)

    with pytest.raises(ToolError, match=r"was installed, but the program says 0\.0\.0"):
        install.with_go(VERSION, tools, log=tmp_path / "log")

    assert names(cache) == {f"{VERSION}-go.build"}
    assert proxy.asked


# --- the release archive --------------------------------------------------------------------------


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of releases, and an empty cache."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with ollama_stand_ins.serving(tmp_path / "releases") as server:
        monkeypatch.setattr(install, "RELEASES", server.url)
        yield server


def released(tmp_path: Path, **options: object) -> str:
    """Put an archive on the server and return its sha256."""
    path = ollama_stand_ins.release(tmp_path / "releases", ARCHIVE, **options)  # type: ignore[arg-type]
    return hashing.digest(path).sha256


def test_the_release_archive_is_installed_by_its_declared_sha256(
    tmp_path: Path, releases: Server
) -> None:
    """It brings a llama-server of its own, which is the one that runs."""
    sha256 = released(tmp_path)

    program = install.from_archive(VERSION, sha256, log=tmp_path / "log")

    assert install.version_of(program, tmp_path / "log") == VERSION
    server = engines.llama_server_of(program)
    assert engines.llama_version(server, tmp_path / "log") == "10488 (abcdef123)"
    assert names(tmp_path / "cache/ollama") == {f"{VERSION}-release", "downloads"}
    assert not list((tmp_path / "cache/ollama/downloads").iterdir())
    assert install.from_archive(VERSION, sha256, log=tmp_path / "log") == program
    assert releases.asked == [f"/v{VERSION}/{ARCHIVE}"]


def test_another_archive_than_the_declared_one_is_never_unpacked(
    tmp_path: Path, releases: Server
) -> None:
    """Both digests are said, and nothing is kept."""
    sha256 = released(tmp_path)

    with pytest.raises(DigestError, match=f"wanted sha256 {'0' * 64}, got {sha256}"):
        install.from_archive(VERSION, "0" * 64, log=tmp_path / "log")

    assert names(tmp_path / "cache/ollama") == {"downloads"}
    assert not list((tmp_path / "cache/ollama/downloads").iterdir())
    assert len(releases.asked) == 1


def test_without_a_declared_sha256_nothing_is_downloaded(tmp_path: Path, releases: Server) -> None:
    """And the sentence says so, and where the digest is found."""
    released(tmp_path)

    with pytest.raises(MachineError, match=r"No sha256 .* so none is downloaded") as caught:
        install.from_archive(VERSION, None, log=tmp_path / "log")

    assert "serving.ollama_archive_sha256" in caught.value.hint
    assert releases.asked == []


def test_a_download_that_was_cut_goes_on_where_it_ended(tmp_path: Path, releases: Server) -> None:
    """Two gigabytes are not fetched twice."""
    sha256 = released(tmp_path)
    releases.cut_bytes = 700_000
    with pytest.raises(MachineError, match="could not be downloaded"):
        install.from_archive(VERSION, sha256, log=tmp_path / "log")
    releases.cut_bytes = None

    install.from_archive(VERSION, sha256, log=tmp_path / "log")

    first, second = releases.starts
    assert first == 0
    assert 0 < second <= 700_000


@pytest.mark.parametrize("left_out", ["lib/ollama/llama-server", "bin/ollama"])
def test_an_archive_that_is_no_whole_ollama_is_not_kept(
    tmp_path: Path, releases: Server, left_out: str
) -> None:
    """Older archives have no llama-server."""
    sha256 = released(tmp_path, leave_out=(left_out,))

    with pytest.raises(ToolError, match=f"holds no {left_out}"):
        install.from_archive(VERSION, sha256, log=tmp_path / "log")

    assert f"{VERSION}-release" not in names(tmp_path / "cache/ollama")
    assert releases.asked


def test_without_zstd_the_archive_is_not_even_downloaded(
    tmp_path: Path, releases: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python cannot read it, either."""
    sha256 = released(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tar").symlink_to(shutil.which("tar") or "/bin/tar")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    with pytest.raises(MachineError, match="zstd is not on PATH") as caught:
        install.from_archive(VERSION, sha256, log=tmp_path / "log")

    assert "apt-get install zstd" in caught.value.hint
    assert releases.asked == []


def test_a_server_without_the_archive_or_no_server_is_said(
    tmp_path: Path, releases: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it answers."""
    (tmp_path / "releases").mkdir(exist_ok=True)
    with pytest.raises(MachineError, match="the server answers 404"):
        install.from_archive(VERSION, "0" * 64, log=tmp_path / "log")
    monkeypatch.setattr(install, "RELEASES", "http://127.0.0.1:1")
    with pytest.raises(MachineError, match="could not be downloaded: ConnectionError"):
        install.from_archive(VERSION, "0" * 64, log=tmp_path / "log")
    assert releases.asked


def test_there_is_no_archive_for_every_machine(
    tmp_path: Path, releases: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """riscv64 has none."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    with pytest.raises(MachineError, match=r"no release archive for .* on riscv64"):
        install.from_archive(VERSION, "0" * 64, log=tmp_path / "log")
    assert releases.asked == []
