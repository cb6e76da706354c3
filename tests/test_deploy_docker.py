"""What deploy/docker promises of its files; the image itself has to be built where images are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sample

from checks import installed

ROOT = Path(__file__).resolve().parent.parent
DEPLOYED = ROOT / "deploy/docker"
DOCKERFILE = (DEPLOYED / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """Return what stands after each instruction of this name, joined to one line."""
    joined = re.sub(r"\\\n", " ", DOCKERFILE)
    return re.findall(rf"^{name} +(.+)$", joined, re.MULTILINE)


def hadolint(text: str) -> list[str]:
    """Return the rules that a Dockerfile breaks; the test is skipped without the program."""
    try:
        program = installed.validators() / installed.HADOLINT
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    done = subprocess.run(
        [program, "--no-color", "--format", "tty", "-"], input=text, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    return [line.split()[1] for line in done.stdout.splitlines()]


def test_hadolint_finds_nothing_and_would_find_it() -> None:
    """Of its own rules; each of three planted faults is named."""
    assert hadolint(DOCKERFILE) == []
    for there, planted, rule in (
        (" --no-install-recommends", "", "DL3015"),
        ("\nUSER 1001\n", "\n", "DL3002"),
        ("WORKDIR /home/runner", "RUN cd /home/runner", "DL3003"),
    ):
        assert there in DOCKERFILE
        assert rule in hadolint(DOCKERFILE.replace(there, planted))


def test_every_image_is_named_by_its_digest_and_nothing_runs_as_root() -> None:
    """What is built upon cannot change under us; the last stages have a user without groups."""
    stages = {line.split(" AS ")[1] for line in instructions("FROM") if " AS " in line}
    for line in instructions("FROM"):
        image = line.split(" AS ")[0]
        assert image in stages or re.fullmatch(r"\S+:[0-9][\w.-]*@sha256:[0-9a-f]{64}", image), line
    assert instructions("USER") == ["0", "1001"]
    assert "usermod --groups '' runner" in DOCKERFILE
    assert "latest" not in DOCKERFILE
    script = (ROOT / "deploy/runner/install.sh").read_text()
    version = re.search(r"RUNNER_VERSION=(\S+)", script)
    assert version
    assert f"actions-runner:{version[1]}@" in DOCKERFILE
    for folder in ("deploy/runner", "deploy/docker"):
        assert f"runner {version[1]}" in (ROOT / folder / "README.md").read_text()


def test_a_pod_finds_what_a_machine_of_its_own_has() -> None:
    """The hooks, root's; the same variables as runner.env; the same places."""
    told = dict(each.split("=", 1) for each in " ".join(instructions("ENV")).split())
    for line in (ROOT / "deploy/runner/runner.env").read_text().splitlines():
        name, _, value = line.partition("=")
        assert told[name] == value
    # With other architectures than those of the build a job would build its tools anew.
    assert told["CUDAARCHS"] == "$CUDAARCHS"
    copies = [line for line in instructions("COPY") if "/etc/gguf-fleet" in line]
    for name in ("job-started.sh", "job-completed.sh", "runner_hooks.py", "dvc-config"):
        (copy,) = [line for line in copies if f"deploy/runner/{name}" in line]
        assert "--chown=root:root" in copy
        assert re.search(r"--chmod=(755|644) ", copy)
    assert not any("runner.json" in copy for copy in copies)


def _let_through(name: str) -> bool:
    """Tell whether Dockerfile.dockerignore lets a tracked file into the build."""
    lines = (DEPLOYED / "Dockerfile.dockerignore").read_text().splitlines()
    wanted = [line[1:] for line in lines if line.startswith("!")]
    return any(name == each or name.startswith(f"{each}/") for each in wanted)


@pytest.mark.toolchain
def test_what_the_build_sees_of_a_checkout_is_enough_to_set_up_and_to_build(tmp_path: Path) -> None:
    """The two programs of its RUN, on such a checkout: one prepares, one finds the built tools."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    names = [name for name in listed if name and _let_through(name)]
    assert not any(name.startswith(("results/", "tests/", ".git")) for name in names)
    # The declaration, and what it names, is the operator's.
    theirs = ("params.yaml", "modelfiles", "corpora")
    for name in names:
        if not name.startswith(theirs) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    sample.take(tmp_path, *theirs)
    # A fork for a card is tested on a machine without one, too.
    declared = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(re.sub(r"  backend: \w+", "  backend: auto", declared))
    (run,) = [line for line in instructions("RUN") if "pipelines.bootstrap" in line]
    assert "python3 -m pipelines.bootstrap convert --shared --toolchain true" in run
    # An environment that is there is taken as it is, so nothing is downloaded; the tools are found.
    env = {**os.environ, "GGUF_FLEET_VENV": str(Path(sys.executable).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.bootstrap", "convert", "--shared", "--toolchain", "true"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_pod_lays_what_the_image_brought_into_its_cache_once(tmp_path: Path) -> None:
    """What is there stays, a half is none, and with --fresh nothing of a job before stays."""
    script = tmp_path / "pod-prepare.sh"
    text = (DEPLOYED / "pod-prepare.sh").read_text()
    for place in ("/srv/gguf-fleet", "/opt/gguf-fleet"):
        text = text.replace(place, str(tmp_path / place[1:4]))
    script.write_text(text)
    image, node = tmp_path / "opt/cache", tmp_path / "srv/cache"
    for name in ("environments/aaa/bin/python", "environments/aaa.log", "toolchain/cpu-1/bin/x"):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).write_text("the image's")
    (image / "toolchain/cpu-1/bin/x").chmod(0o755)
    (node / "toolchain/.new/bin").mkdir(parents=True)
    (node / "toolchain/.new/bin/half").touch()

    def prepare(*argv: str) -> None:
        subprocess.run(["/bin/bash", script, *argv], check=True, timeout=60)

    prepare()
    assert os.access(node / "toolchain/cpu-1/bin/x", os.X_OK)
    assert sorted(each.name for each in (node / "toolchain").iterdir()) == ["cpu-1"]
    assert (tmp_path / "srv/runner/_work").is_dir()
    (node / "toolchain/cpu-1/bin/x").write_text("a job's")
    (node / "toolchain/cpu-2").mkdir()
    model = tmp_path / "srv/dvc/cache/model"
    model.touch()
    prepare()
    assert (node / "toolchain/cpu-1/bin/x").read_text() == "a job's"
    assert model.exists()
    prepare("--fresh")
    assert (node / "toolchain/cpu-1/bin/x").read_text() == "the image's"
    assert not (node / "toolchain/cpu-2").exists()
    assert not model.exists()
