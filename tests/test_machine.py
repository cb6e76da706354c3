"""The same machine has the same identity at every probe, and no name of it gets out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines import console, gpu, machine, watch
from pipelines.layout import Layout
from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent


def toolchain(backend: str = "cpu") -> Toolchain:
    """Return a toolchain of which only the manifest is there."""
    manifest = {
        "backend": backend,
        "llama_cpp_commit": "f" * 40,
        "compiler": "gcc 12",
        "cmake_flags": ["-DX=1"],
    }
    return Toolchain(prefix=Path("prefix"), manifest=manifest)


def files(root: Path, texts: dict[str, str]) -> Path:
    """Write a tree of small files, as /proc and /sys show them."""
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_probe_is_the_same_every_time() -> None:
    """Two probes in two processes agree to the byte."""
    code = "import json; from pipelines import machine; print(json.dumps(machine.probe()))"
    there = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert json.loads(there.stdout) == json.loads(json.dumps(machine.probe()))


def test_probe_tells_no_name_and_no_time() -> None:
    """No host name and nothing but hardware facts, whose digest is the id."""
    found = machine.probe()

    assert set(found) == {"schema_version", "hw_id", "cpu", "memory_gib", "gpus"}
    assert platform.node() not in json.dumps(found)
    facts = {key: found[key] for key in ("cpu", "memory_gib", "gpus")}
    assert found["hw_id"] == machine.facts_id(facts)


def test_id_does_not_depend_on_the_order_of_facts() -> None:
    """Canonical JSON: sorted keys; another value is another id."""
    assert machine.facts_id({"a": 1, "b": [2]}) == machine.facts_id({"b": [2], "a": 1})
    assert machine.facts_id({"a": 1}) != machine.facts_id({"a": 2})


def test_probe_imports_nothing_heavy() -> None:
    """It runs at every `dvc repro`: no pydantic, no psutil, and pynvml only with a driver."""
    code = (
        "import sys; from pipelines import machine; machine.probe(); "
        "print([m for m in ('pydantic', 'psutil', 'dvc', 'requests', 'rich') if m in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "[]"


def test_write_leaves_unchanged_files_alone(tmp_path: Path) -> None:
    """DVC compares time stamps first: a probe that finds nothing new touches nothing."""
    at = Layout(tmp_path)
    machine.write(at, toolchain())
    before = [path.stat().st_mtime_ns for path in (at.machine, at.toolchain)]

    machine.write(at, toolchain())

    assert [path.stat().st_mtime_ns for path in (at.machine, at.toolchain)] == before
    assert json.loads(at.machine.read_text()) == json.loads(json.dumps(machine.probe()))
    assert json.loads(at.toolchain.read_text()) == toolchain().manifest


def test_write_replaces_what_changed(tmp_path: Path) -> None:
    """Another toolchain, another file."""
    at = Layout(tmp_path)
    machine.write(at, toolchain())
    changed = Toolchain(prefix=Path("p"), manifest=toolchain().manifest | {"compiler": "clang"})

    machine.write(at, changed)

    assert json.loads(at.toolchain.read_text())["compiler"] == "clang"


def test_cuda_without_a_card_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator learns it at the probe, not after an hour of conversion."""
    said: list[str] = []
    monkeypatch.setattr(console, "warn", said.append)
    monkeypatch.setattr(gpu, "cards", tuple)

    machine.write(Layout(tmp_path), toolchain("cuda"))

    assert len(said) == 1
    assert "no NVIDIA card answers" in said[0]


def test_card_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power limit is a setting, but it decides the speed: 350 W is another machine than 250."""
    ids = set()
    for watts in (350, 250):
        card = gpu.Card(
            name="RTX",
            vram_mib=24_576,
            compute_capability="8.6",
            power_limit_w=watts,
            pcie_generation=4,
            pcie_lanes=16,
        )
        monkeypatch.setattr(gpu, "cards", lambda card=card: (card,))
        ids.add(machine.probe()["hw_id"])

    assert len(ids) == 2


def test_environment_is_not_part_of_the_hardware() -> None:
    """Kernel, compiler and commit have an id of their own, which an update may change."""
    found = machine.environment(toolchain())

    assert found["kernel"].endswith(platform.release())
    assert found["compiler"] == "gcc 12"
    assert platform.node() not in json.dumps(found)
    assert machine.facts_id(found) == machine.facts_id(machine.environment(toolchain()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor: 0\nmodel name\t: AMD Ryzen 9 5950X\nmodel name\t: AMD", "AMD Ryzen 9 5950X"),
        ("Hardware: x\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor: 0\n", platform.machine()),
    ],
)
def test_cpu_model(tmp_path: Path, text: str, expected: str) -> None:
    """x86 and boards name themselves; what has no name is its architecture."""
    assert machine.cpu_model(files(tmp_path, {"cpuinfo": text})) == expected


def test_cpu_model_of_an_arm_server(tmp_path: Path) -> None:
    """Its parts are numbers, in an order that does not depend on the cores' order."""
    text = "CPU implementer : 0x41\nCPU part : 0xd0c\nCPU implementer : 0x41\nCPU part : 0xd0c\n"

    assert machine.cpu_model(files(tmp_path, {"cpuinfo": text})).endswith(" 0x41 0xd0c")


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four hardware threads of two cores are two cores; of one allowed thread, one."""
    topology = {
        f"devices/system/cpu/cpu{cpu}/topology/core_cpus_list": f"{cpu % 2},{cpu % 2 + 2}\n"
        for cpu in range(4)
    }
    sys_ = files(tmp_path / "sys", topology)
    proc = tmp_path / "proc"

    for allowed, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({3}, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert machine.usable_cores(proc, sys_) == cores


def test_cores_without_topology_count_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel hides which threads share a core, each is taken as one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5, 6})

    assert machine.usable_cores(tmp_path, tmp_path) == 3


@pytest.mark.parametrize(
    ("quota", "expected", "cores"),
    [("max 100000", None, 8), ("250000 100000", 2.5, 2), ("50000 100000", 0.5, 1)],
)
def test_quota_of_version_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quota: str,
    expected: float | None,
    cores: int,
) -> None:
    """A container with 2.5 CPUs of time runs two threads, one with half a CPU one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    proc = files(tmp_path / "proc", {"self/cgroup": "0::/job/step\n"})
    sys_ = files(tmp_path / "sys", {"fs/cgroup/job/cpu.max": f"{quota}\n"})

    assert machine.cpu_quota(proc, sys_) == expected
    assert machine.usable_cores(proc, sys_) == cores


def test_tightest_group_above_us_decides(tmp_path: Path) -> None:
    """A limit of the parent holds for the child, and the other way round."""
    proc = files(tmp_path / "proc", {"self/cgroup": "0::/a/b\n"})
    sys_ = files(
        tmp_path / "sys",
        {"fs/cgroup/a/cpu.max": "400000 100000", "fs/cgroup/a/b/cpu.max": "300000 100000"},
    )

    assert machine.cpu_quota(proc, sys_) == 3.0


def test_quota_and_memory_of_version_1(tmp_path: Path) -> None:
    """Version 1 has a tree for each controller; inside a container only its own group is seen."""
    proc = files(tmp_path / "proc", {"self/cgroup": "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x"})
    sys_ = files(
        tmp_path / "sys",
        {
            "fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "fs/cgroup/memory/memory.limit_in_bytes": f"{1 << 30}\n",
        },
    )

    assert machine.usable_memory_bytes(proc, sys_) == 1 << 30
    assert machine.cpu_quota(proc, files(sys_, {"fs/cgroup/cpu/x": ""})) == 1.5


def test_memory_of_version_2(tmp_path: Path) -> None:
    """A limit counts if it is below what the machine has; "max" is none."""
    proc = files(tmp_path / "proc", {"self/cgroup": "0::/job\n"})
    limited = files(tmp_path / "a", {"fs/cgroup/job/memory.max": f"{2 << 30}\n"})
    free = files(tmp_path / "b", {"fs/cgroup/job/memory.max": "max\n"})

    assert machine.usable_memory_bytes(proc, limited) == 2 << 30
    assert machine.usable_memory_bytes(proc, free) > 0


@pytest.mark.parametrize(
    ("size_bytes", "gib"),
    [(int(23.4 * 2**30), 24), (24 << 30, 24), (int(62.6 * 2**30), 64), (1 << 20, 2)],
)
def test_memory_is_rounded_up_to_what_is_sold(size_bytes: int, gib: int) -> None:
    """What the kernel keeps for itself changes with its updates and must not show."""
    assert machine.memory_gib(size_bytes) == gib


# --- what programs below us use ---------------------------------------------------------------


def test_watch_sees_memory_and_waiting_of_a_program_below_us(tmp_path: Path) -> None:
    """The kernel's peak of the named program; Python beside it does not count."""
    program = tmp_path / "grower"
    program.symlink_to(sys.executable)
    code = "import sys; x = bytearray(64 << 20); sys.stdout.write('.'); sys.stdout.flush(); input()"
    with (
        watch.Watch("grower", every_s=60) as grower,
        watch.Watch("absent", every_s=60) as absent,
        subprocess.Popen(
            [program, "-I", "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
    ):
        assert child.stdout is not None
        child.stdout.read(1)
        grower.sample()
        absent.sample()
        assert child.pid in grower.pids()
        child.communicate(b"\n")

    found = grower.usage()
    assert 64 << 20 <= found.peak_rss_bytes < 200 << 20
    assert found.on_core_s > 0
    assert found.waited_s is not None
    assert absent.usage().peak_rss_bytes == 0
    assert absent.usage().waited_s is None


def test_descendants_include_grandchildren() -> None:
    """A tool may be started by a wrapper; both are ours."""
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE); "
        "print(p.pid, flush=True); input(); p.communicate(b'\\n')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())

        assert {child.pid, grandchild} <= watch.descendants()
        assert grandchild in watch.descendants(child.pid)
        child.communicate(b"\n")
    assert grandchild not in watch.descendants()


def test_without_proc_children_are_found_all_the_same(tmp_path: Path) -> None:
    """Where there is no /proc, as on macOS, psutil names the children and their memory."""
    program = tmp_path / "grower"
    program.symlink_to(sys.executable)
    with subprocess.Popen(
        [program, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()

        assert child.pid in watch.descendants(proc=tmp_path / "absent")
        child.communicate(b"\n")


def test_layout_of_machine_facts() -> None:
    """The facts are plain JSON, so that a review shows which of them changed."""
    found: dict[str, Any] = machine.probe()

    assert found["cpu"]["cores_count"] >= 1
    assert found["memory_gib"] >= 1
    assert found["schema_version"] == 1
