"""
The toolchain: one pinned llama.cpp, built once, whole or absent.

Most tests build a stand-in sdist: the same layout, the same cmake and ninja, two C files. The last
part looks at the real prefix, which `make test` builds first.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from pipelines import hashing, proc, toolchain_build
from pipelines.errors import DigestError, MachineError, ToolError
from pipelines.toolchain import (
    MANIFEST_NAME,
    TOOLS,
    ToolchainSpec,
    default_cache_root,
    detect_backend,
    ensure,
    main_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipelines.toolchain import Toolchain

REPOSITORY = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SLOW_STEPS = 6

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.14)
project(stand_in C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
foreach(step RANGE 1 @STEPS@)
  add_custom_command(OUTPUT step${step}.c
    COMMAND sleep @SECONDS@
    COMMAND sh -c "echo 'int step${step};' > step${step}.c; echo ${step} >> $ENV{STAND_IN_LOG}"
    VERBATIM)
  list(APPEND steps ${CMAKE_BINARY_DIR}/step${step}.c)
endforeach()
add_library(llama SHARED library.c ${steps})
target_compile_definitions(llama PRIVATE COMMIT="${LLAMA_BUILD_COMMIT}")
set_target_properties(llama PROPERTIES VERSION 0.0.1 SOVERSION 0)
foreach(tool @TOOLS@)
  add_executable(${tool} main.c)
  target_link_libraries(${tool} llama)
endforeach()
"""


def stand_in_sdist(directory: Path, *, seconds: float = 0.0, head: str = COMMIT) -> ToolchainSpec:
    """Write a tiny sdist laid out like llama-cpp-python's; returns the spec that pins it."""
    lists = CMAKE_LISTS.replace("@TOOLS@", " ".join(TOOLS)).replace("@STEPS@", str(SLOW_STEPS))
    vendored = "vendor/llama.cpp"
    files = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.0.1\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        'backend-path = ["."]\n',
        "backend.py": "import os\n"
        "def prepare_metadata_for_build_wheel(directory, settings=None):\n"
        "    name = 'llama_cpp_python-0.0.1.dist-info'\n"
        "    os.mkdir(os.path.join(directory, name))\n"
        "    with open(os.path.join(directory, name, 'METADATA'), 'w') as file:\n"
        "        file.write(open('PKG-INFO').read())\n"
        "    return name\n",
        "LICENSE.md": "MIT",
        "llama_cpp/__init__.py": '__version__ = "0.0.1"\n',
        ".git/modules/vendor/llama.cpp/HEAD": f"{head}\n",
        f"{vendored}/.git": "gitdir: ../../.git/modules/vendor/llama.cpp\n",
        f"{vendored}/LICENSE": "MIT",
        f"{vendored}/CMakeLists.txt": lists.replace("@SECONDS@", str(seconds)),
        f"{vendored}/library.c": "const char * llama_commit(void) { return COMMIT; }\n",
        f"{vendored}/main.c": "#include <stdio.h>\nconst char * llama_commit(void);\n"
        'int main(void) { printf("version: 1 (%s) " __FILE__ "\\n", llama_commit()); }\n',
        f"{vendored}/convert_hf_to_gguf.py": "print('converter')\n",
        f"{vendored}/conversion/__init__.py": "",
        f"{vendored}/gguf-py/gguf/__init__.py": "",
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "llama_cpp_python-0.0.1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-0.0.1/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ToolchainSpec(llama_cpp_python="0.0.1", sha256=digest, backend="cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; each executed build step of the stand-in adds a line to steps.log."""
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "steps.log"))
    return tmp_path / "cache"


def downloaded(cache: Path, *, seconds: float = 0.0, head: str = COMMIT) -> ToolchainSpec:
    """A stand-in sdist that is already in the cache's downloads."""
    return stand_in_sdist(cache / "toolchain" / "downloads", seconds=seconds, head=head)


def steps_run(cache: Path) -> list[str]:
    """The build steps executed so far, in order, repetitions included."""
    log = cache.parent / "steps.log"
    return log.read_text().split() if log.exists() else []


def start_ensure(spec: ToolchainSpec, cache: Path) -> subprocess.Popen[str]:
    """`ensure` in a process of its own, as `fleet toolchain` would be."""
    code = (
        "import sys; from pathlib import Path; from pipelines.toolchain import *\n"
        f"print(ensure({spec!r}, cache_root=Path({str(cache)!r}), offline=True).prefix)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> None:
    """Poll until `condition` holds; the deadline only guards against hanging for ever."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def path_with(directory: Path, *programs: str) -> str:
    """A PATH that holds nothing but `programs`."""
    directory.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None
        (directory / program).symlink_to(found)
    return str(directory)


# --- building ------------------------------------------------------------------------------------


def test_a_pinned_sdist_becomes_a_prefix_whose_tools_report_its_commit(cache: Path) -> None:
    """From one pinned file come runnable tools, the converter and bindings of one commit."""
    toolchain = ensure(downloaded(cache), cache_root=cache, offline=True)

    said = proc.run([toolchain.tool("llama-bench"), "--version"], log=cache / "log").stdout
    assert COMMIT[:9] in said
    assert toolchain.commit == COMMIT
    assert toolchain.backend == "cpu"
    assert toolchain.converter.read_text() == "print('converter')\n"
    assert sorted(toolchain.manifest["tools"]) == sorted(TOOLS)
    assert COMMIT[:12] in main_text(toolchain)


def test_equal_inputs_give_an_equal_toolchain_json_wherever_the_cache_lies(cache: Path) -> None:
    """DVC sees no change between two machines that built the same thing in different places."""
    spec = downloaded(cache)
    elsewhere = cache.parent / "a" / "quite" / "different" / "place"
    shutil.copytree(cache, elsewhere)

    here = ensure(spec, cache_root=cache, offline=True)
    there = ensure(spec, cache_root=elsewhere, offline=True)

    text = (here.prefix / MANIFEST_NAME).read_bytes()
    assert text == (there.prefix / MANIFEST_NAME).read_bytes()
    assert str(cache).encode() not in text
    assert text.decode() == here.manifest_text() + "\n"
    assert all(
        str(cache).encode() not in path.read_bytes() for path in (here.prefix / "bin").iterdir()
    )


def test_raising_the_recipe_does_not_rebuild_the_tools(cache: Path) -> None:
    """The recipe number re-runs stages; the same llama.cpp is not compiled for it again."""
    spec = downloaded(cache)
    first = ensure(spec, cache_root=cache, offline=True)
    raised = ToolchainSpec(spec.llama_cpp_python, spec.sha256, spec.backend, recipe=2)

    assert ensure(raised, cache_root=cache, offline=True) == first
    assert len(steps_run(cache)) == SLOW_STEPS


def test_a_ready_toolchain_is_returned_without_starting_a_program_or_reading_an_artifact(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage calls `ensure`; when there is nothing to do it does nothing."""
    spec = downloaded(cache)
    first = ensure(spec, cache_root=cache, offline=True)
    monkeypatch.setattr(proc, "run", lambda *_args, **_named: pytest.fail("a program was started"))
    monkeypatch.setattr(hashing, "digest", lambda *_args: pytest.fail("an artifact was read"))

    assert ensure(spec, cache_root=cache) == first


def test_a_finished_build_leaves_the_prefix_and_the_sdist_and_nothing_else_large(
    cache: Path,
) -> None:
    """The 0.6 GB of sources and objects go away once the prefix is complete."""
    toolchain = ensure(downloaded(cache), cache_root=cache, offline=True)

    left = {path.name for path in (cache / "toolchain").iterdir() if path.is_dir()}
    assert left == {"downloads", "logs", "selected", toolchain.prefix.name}


# --- interruptions -------------------------------------------------------------------------------


def test_a_build_killed_half_way_goes_on_where_it_stopped(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 the finished steps are not repeated and no half-written prefix is seen."""
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "1")
    spec = downloaded(cache, seconds=0.3)
    killed = start_ensure(spec, cache)
    wait_until(lambda: len(steps_run(cache)) >= 3)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    assert not list((cache / "toolchain").glob(f"cpu-*/{MANIFEST_NAME}"))
    toolchain = ensure(spec, cache_root=cache, offline=True)

    toolchain.verify()
    assert set(steps_run(cache)) == {str(number + 1) for number in range(SLOW_STEPS)}
    assert len(steps_run(cache)) <= SLOW_STEPS + 1  # the one that ran when the kill came


def test_without_ninja_make_does_it(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ninja adds is that a killed build goes on; it is not required."""
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, *rest: None if "ninja" in name else which(name, *rest)
    )

    ensure(downloaded(cache), cache_root=cache, offline=True).verify()

    assert len(steps_run(cache)) == SLOW_STEPS


def test_an_unpacking_cut_in_the_middle_is_done_again(cache: Path) -> None:
    """Half of the sources never count as the sources."""
    spec = downloaded(cache)
    plan = toolchain_build._plan(spec, "cpu", "declared", cache / "log")
    half = cache / "toolchain" / f"{plan.key}.build" / ".source.part" / "llama_cpp_python-0.0.1"
    half.mkdir(parents=True)
    (half / "LICENSE.md").write_text("half")

    ensure(spec, cache_root=cache, offline=True).verify()


def test_two_at_once_build_once_and_the_second_says_whom_it_waits_for(cache: Path) -> None:
    """Two jobs of one runner that need the toolchain share one build."""
    spec = downloaded(cache, seconds=0.2)
    both = [start_ensure(spec, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]

    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(steps_run(cache)) == SLOW_STEPS
    pids = [str(process.pid) for process in both]
    waiting = [err for _, err in outputs if "Waiting for process" in err]
    assert len(waiting) == 1
    assert any(pid in waiting[0] for pid in pids)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_prefix_that_lost_a_tool_is_built_again(cache: Path, damage: str) -> None:
    """A tool that is gone or cut short is noticed before any stage could run it."""
    spec = downloaded(cache)
    tool = ensure(spec, cache_root=cache, offline=True).tool("llama-quantize")
    if damage == "missing":
        tool.unlink()
    else:
        tool.write_bytes(tool.read_bytes()[:100])

    rebuilt = ensure(spec, cache_root=cache, offline=True)

    rebuilt.verify()
    assert rebuilt.tool("llama-quantize").stat().st_size > 100


def test_verify_names_the_file_that_rotted_with_both_digests(cache: Path) -> None:
    """A flipped byte of equal length passes the quick look and not `fleet toolchain --verify`."""
    toolchain = ensure(downloaded(cache), cache_root=cache, offline=True)
    tool = toolchain.tool("llama-perplexity")
    rotten = bytearray(tool.read_bytes())
    rotten[-1] ^= 1
    tool.chmod(0o755)
    tool.write_bytes(rotten)

    with pytest.raises(DigestError) as caught:
        toolchain.verify()

    assert "tools/llama-perplexity" in caught.value.message
    assert toolchain.manifest["tools"]["llama-perplexity"]["sha256"] in caught.value.message
    assert hashlib.sha256(rotten).hexdigest() in caught.value.message


def test_running_the_converter_does_not_make_the_toolchain_look_changed(cache: Path) -> None:
    """What Python caches beside a module is not part of the toolchain."""
    toolchain = ensure(downloaded(cache), cache_root=cache, offline=True)
    compiled = toolchain.converter.parent / "conversion" / "__pycache__" / "base.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"anything")

    toolchain.verify()


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def pip_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose private pip, if this environment needs one, is made once for all tests."""
    return tmp_path_factory.mktemp("pip")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is pip's only index."""
    directory = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_the_sdist_is_downloaded_through_pip_with_the_users_own_index_settings(
    index: Path, pip_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A company mirror configured for pip is a mirror configured for the fleet."""
    monkeypatch.setenv("STAND_IN_LOG", str(pip_home / "steps.log"))

    toolchain = ensure(stand_in_sdist(index), cache_root=pip_home)

    assert toolchain.commit == COMMIT


def test_an_sdist_with_another_digest_is_refused_before_any_of_it_runs(
    index: Path, pip_home: Path
) -> None:
    """The message names the file, the digest wanted and the digest got; nothing is kept."""
    honest = stand_in_sdist(index)
    wanted = "f" * 64

    with pytest.raises(DigestError) as caught:
        ensure(ToolchainSpec("0.0.1", wanted, "cpu"), cache_root=pip_home)

    assert "llama-cpp-python==0.0.1" in caught.value.message
    assert wanted in caught.value.message
    assert honest.sha256 in caught.value.message
    assert "params.yaml" in caught.value.hint


def test_a_version_that_no_index_has_is_a_machine_error_with_pips_own_words(
    index: Path, pip_home: Path
) -> None:
    """No network and a mistyped version end in one line that says what to check."""
    index.mkdir()

    with pytest.raises(MachineError, match=r"llama-cpp-python==9\.9\.9") as caught:
        ensure(ToolchainSpec("9.9.9", "f" * 64, "cpu"), cache_root=pip_home)

    assert "PIP_INDEX_URL" in caught.value.hint


def test_offline_without_a_build_says_so_and_what_to_do(cache: Path) -> None:
    """Offline, an absent toolchain is one clear refusal, not a hanging download."""
    with pytest.raises(MachineError, match="Offline") as caught:
        ensure(ToolchainSpec("0.0.1", "0" * 64, "cpu"), cache_root=cache, offline=True)

    assert "fleet toolchain" in caught.value.hint


def test_without_a_compiler_it_names_what_is_missing_and_the_command_that_installs_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any download the operator reads which programs to install, per system."""
    monkeypatch.setenv("PATH", path_with(cache.parent / "bin", "make"))

    with pytest.raises(MachineError) as caught:
        ensure(downloaded(cache), cache_root=cache)

    assert "a C compiler (cc), a C++ compiler (c++), cmake not found" in caught.value.message
    for command in ("apt-get install", "dnf install", "brew install"):
        assert command in caught.value.hint


def test_a_host_without_a_compiler_uses_the_prefix_of_a_like_machine(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restored cache is enough for a runner: one machine per fleet needs compilers."""
    spec = downloaded(cache)
    built = ensure(spec, cache_root=cache, offline=True)
    monkeypatch.setenv("PATH", path_with(cache.parent / "bin", "make"))

    assert ensure(spec, cache_root=cache, offline=True) == built


def test_a_full_disk_is_noticed_before_the_first_byte(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The needed and the free space are in the message; nothing has been unpacked."""
    spec = downloaded(cache)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=5 * 2**20))

    with pytest.raises(MachineError, match=r"needs 1\.0 GiB .* 0\.0 GiB are free"):
        ensure(spec, cache_root=cache, offline=True)

    assert not list((cache / "toolchain").glob("*.build"))


def test_a_build_that_fails_shows_the_compilers_last_lines_and_its_log(cache: Path) -> None:
    """A failed build names the log with all of it, and the next run tries again."""
    spec = downloaded(cache, seconds=0.0)
    sdist = cache / "toolchain" / "downloads" / "llama_cpp_python-0.0.1.tar.gz"
    broken = sdist.with_name("broken.tar.gz")
    with tarfile.open(sdist) as old, tarfile.open(broken, "w:gz") as new:
        for member in old.getmembers():
            file = old.extractfile(member)
            data = file.read() if file else b""
            if member.name.endswith("library.c"):
                data = b"this is no C\n"
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    broken.replace(sdist)
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()

    with pytest.raises(ToolError) as caught:
        ensure(ToolchainSpec(spec.llama_cpp_python, digest, "cpu"), cache_root=cache, offline=True)

    assert caught.value.log is not None
    assert "this is no C" in caught.value.log.read_text()


def test_an_sdist_without_its_git_data_is_refused_because_nobody_could_name_its_commit(
    cache: Path,
) -> None:
    """A toolchain of an unknown commit would make every record worthless."""
    spec = downloaded(cache, head="ref: refs/heads/main")

    with pytest.raises(ToolError, match=r"which llama\.cpp commit"):
        ensure(spec, cache_root=cache, offline=True)


def test_asking_for_a_tool_that_does_not_exist_lists_those_that_do(cache: Path) -> None:
    """A mistyped tool name is answered with the names there are."""
    toolchain = ensure(downloaded(cache), cache_root=cache, offline=True)

    with pytest.raises(ToolError) as caught:
        toolchain.tool("llama-quantise")

    assert "llama-quantize" in caught.value.hint


# --- backends ------------------------------------------------------------------------------------


def test_nvidia_cards_are_read_from_nvidia_smi_as_cmake_wants_them() -> None:
    """Name, architecture without a dot, driver series; a line of another kind is no card."""
    text = "NVIDIA GeForce RTX 3090, 8.6, 580.65.06\nNVIDIA H200, 9.0, 580.65.06\nNo devices\n"

    cards = toolchain_build.cards_from_csv(text)

    assert [card.architecture for card in cards] == ["86", "90"]
    assert cards[0].name == "NVIDIA GeForce RTX 3090"
    assert cards[0].driver_major == 580


def test_a_card_whose_driver_does_not_tell_its_version_is_a_card() -> None:
    """`[N/A]` in a column is no reason to end with a traceback, nor to lose the card."""
    (found,) = toolchain_build.cards_from_csv("NVIDIA H200, 9.0, [N/A]\n")

    assert (found.name, found.architecture, found.driver_major) == ("NVIDIA H200", "90", None)


@pytest.mark.parametrize(
    "call", ["nvmlSystemGetDriverVersion", "nvmlDeviceGetCount", "nvmlDeviceGetName",
             "nvmlDeviceGetCudaComputeCapability", "nvmlShutdown"],
)  # fmt: skip
def test_a_driver_that_fails_in_the_middle_is_asked_by_its_own_program(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A card that fell off the bus raises in any call of NVML: nvidia-smi has the last word."""

    class NVMLError(Exception):
        pass

    def fail(*_: object) -> None:
        raise NVMLError("GPU is lost")

    calls = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda _: "NVIDIA H200",
        "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
    }
    fake = SimpleNamespace(NVMLError=NVMLError, **(calls | {call: fail}))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(toolchain_build, "_cards_from_nvidia_smi", lambda: (card("86"),))

    found = toolchain_build.nvidia_cards()

    # What fails only at the end has answered before.
    assert [one.architecture for one in found] == ["90" if call == "nvmlShutdown" else "86"]


def test_the_manifest_names_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name stands before the version, and a prefix that was built before keeps its key."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\necho 'c++ (Debian 12.2.0) 12.2.0'; "
        "echo 'Copyright (C) 2022 Free Software Foundation, Inc.'\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    plan = toolchain_build._plan(
        ToolchainSpec("0.0.1", "0" * 64, "cpu"), "cpu", "declared", tmp_path / "log"
    )
    compiler.write_text("#!/bin/sh\necho 'Debian clang version 14.0.6'\n")

    assert plan.described()["compiler"] == "gcc (Debian 12.2.0) 12.2.0"
    assert plan.key == replace(plan, compiler="(Debian 12.2.0) 12.2.0").key
    assert toolchain_build._compiler_version(tmp_path / "log") == "clang version 14.0.6"


def card(architecture: str, driver_major: int = 580) -> toolchain_build.Card:
    """A card for tests."""
    return toolchain_build.Card(
        name="RTX 3090", architecture=architecture, driver_major=driver_major
    )


def test_auto_means_cuda_exactly_when_a_driver_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice comes with its reason, which names the cards."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(toolchain_build, "nvidia_cards", lambda: (card("86"), card("86")))
    assert detect_backend() == ("cuda", "the NVIDIA driver reports 2 card(s): RTX 3090")

    monkeypatch.setattr(toolchain_build, "nvidia_cards", lambda: ())
    assert detect_backend()[0] == "cpu"
    assert detect_backend("vulkan") == ("vulkan", "declared in params.yaml")


def test_cuda_without_a_card_needs_a_declared_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody compiles half an hour for a card that nobody named."""
    spec = ToolchainSpec("0.0.1", "0" * 64, "cuda")
    monkeypatch.delenv("CUDAARCHS", raising=False)
    with pytest.raises(MachineError, match="no NVIDIA driver answers"):
        toolchain_build._architectures(spec, ())

    monkeypatch.setenv("CUDAARCHS", "90;86")
    assert toolchain_build._architectures(spec, ()) == ("86", "90")


def test_a_machine_with_two_kinds_of_cards_compiles_for_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Architectures are sorted and listed once, so that equal machines share a key."""
    monkeypatch.delenv("CUDAARCHS", raising=False)
    spec = ToolchainSpec("0.0.1", "0" * 64, "cuda")

    found = toolchain_build._architectures(spec, (card("120"), card("86"), card("86")))

    assert found == ("86", "120")


def test_a_driver_too_old_for_the_cuda_wheels_is_named_with_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver would compile for half an hour and then find no card."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(toolchain_build, "_system_nvcc", lambda: None)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")

    with pytest.raises(MachineError, match="series 535") as caught:
        toolchain_build._cuda_version((card("86", driver_major=535),), tmp_path / "log")

    assert "580" in caught.value.hint
    assert "CUDA 12" in caught.value.hint


@pytest.mark.parametrize(
    ("devices", "warns"),
    [("(none)", True), ("CUDA0: NVIDIA GeForce RTX 3090 (24253 MiB, 23843 MiB free)", False)],
)
def test_a_device_build_that_finds_no_device_says_that_the_cpu_will_compute(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], devices: str, *, warns: bool
) -> None:
    """Of itself llama.cpp falls back to the CPU without a word; the toolchain has one."""
    spec = ToolchainSpec("0.0.1", "0" * 64, "cpu")
    plan = replace(toolchain_build._plan(spec, "cpu", "declared", tmp_path / "log"), backend="cuda")
    bench = tmp_path / "bin" / "llama-bench"
    bench.parent.mkdir()
    bench.write_text(f"#!/bin/sh\necho 'Available devices:'\necho '  {devices}'\n")
    bench.chmod(0o755)

    toolchain_build._warn_without_device(plan, tmp_path, tmp_path / "log")

    assert ("finds no device" in capfd.readouterr().err) == warns


def test_whatever_changes_the_bytes_changes_the_key(tmp_path: Path) -> None:
    """Backend, architectures, sdist, compiler and C library each name another prefix."""
    spec = ToolchainSpec("0.0.1", "0" * 64, "cpu")
    plan = toolchain_build._plan(spec, "cpu", "declared", tmp_path / "log")
    others = [
        replace(plan, spec=ToolchainSpec("0.0.1", "1" * 64, "cpu")),
        replace(plan, backend="vulkan"),
        replace(plan, compiler="another 1.0"),
        replace(plan, system="Linux x86_64 glibc 2.17"),
        replace(plan, flags=(*plan.flags, "-DGGML_OPENMP=OFF")),
        replace(plan, cuda_architectures=("86",)),
        replace(plan, cuda_toolkit="12.8.93"),
    ]

    assert len({plan.key, *(other.key for other in others)}) == len(others) + 1
    assert plan.key.startswith("cpu-")


def test_no_cmake_flag_of_the_key_holds_a_path() -> None:
    """The key must be the same in every user's home."""
    for backend in ("cpu", "cuda", "vulkan", "metal"):
        flags = toolchain_build._flags(backend, ("86",))
        assert not any("/" in flag for flag in flags)


def test_the_cache_follows_the_fleets_variable_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One variable moves everything large to another disk."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "fleet"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_root() == tmp_path / "fleet"

    monkeypatch.delenv("GGUF_FLEET_CACHE")
    assert default_cache_root() == tmp_path / "xdg" / "gguf-fleet"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_root() == tmp_path / "home" / ".cache" / "gguf-fleet"


# --- the real one --------------------------------------------------------------------------------


@pytest.mark.toolchain
@pytest.mark.parametrize("name", TOOLS)
def test_every_real_tool_starts_and_finds_its_libraries(
    tools: Toolchain, name: str, tmp_path: Path
) -> None:
    """Each program of the prefix runs from where it lies, without any library path."""
    proc.run(
        [tools.tool(name), "--help"],
        log=tmp_path / "log",
        env={"LD_LIBRARY_PATH": ""},
        ok_codes=(0, 1),
    )


@pytest.mark.toolchain
def test_the_real_server_reports_the_pinned_commit(tools: Toolchain, tmp_path: Path) -> None:
    """The commit in toolchain.json is the one compiled into the binaries."""
    done = proc.run([tools.tool("llama-server"), "--version"], log=tmp_path / "log")

    assert tools.commit[:9] in done.stdout + done.stderr


@pytest.mark.toolchain
def test_nothing_real_names_the_directory_it_was_built_in(tools: Toolchain) -> None:
    """No path of the building machine is in toolchain.json, a program or a library."""
    home = str(tools.prefix.parent).encode()
    files = [tools.prefix / MANIFEST_NAME, *(tools.prefix / "bin").iterdir()]
    files += [path for path in (tools.prefix / "lib").iterdir() if not path.is_symlink()]

    assert [path.name for path in files if home in path.read_bytes()] == []


@pytest.mark.toolchain
def test_the_real_bindings_load_the_libraries_of_the_prefix(
    tools: Toolchain, tmp_path: Path
) -> None:
    """`import llama_cpp` uses the very libllama that the tools use."""
    code = (
        "import llama_cpp; llama_cpp.llama_backend_init(); print(llama_cpp.__file__); "
        "print(llama_cpp.__version__); print(*[l.split()[-1] for l in open('/proc/self/maps') "
        "if 'libllama' in l])"
    )
    done = proc.run([sys.executable, "-c", code], log=tmp_path / "log", env=tools.python_env())

    assert str(tools.prefix / "python" / "llama_cpp") in done.stdout
    assert tools.manifest["llama_cpp_python"] in done.stdout
    if sys.platform == "linux":
        assert str(tools.prefix / "lib") in done.stdout


@pytest.mark.toolchain
def test_the_real_toolchain_is_what_its_manifest_says(tools: Toolchain) -> None:
    """Every byte of the real prefix is the byte that was built."""
    tools.verify()

    assert json.loads((tools.prefix / MANIFEST_NAME).read_text()) == tools.manifest
