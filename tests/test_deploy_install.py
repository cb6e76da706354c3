"""What deploy/runner/install.sh promises, on a machine of its own: this one under an overlay."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DEPLOYED = ROOT / "deploy/runner"
SCRIPT = "/opt/fleet/deploy/runner/install.sh"
VERSION = "2.400.0"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nsecret\n-----END RSA PRIVATE KEY-----\n"
LEVEL_2 = ("--repository", "octo/fleet", "--repository-id", "7", "--host", "desk",
           "--client-id", "Iv23test", "--key", "/mnt/app.pem")  # fmt: skip
LEVEL_1 = ("--level", "1", "--repository", "octo/fleet", "--repository-id", "7", "--host", "desk",
           "--token-file", "/mnt/token")  # fmt: skip
# Everything of the system is real but these: systemd does not run here, there is no card, and no
# package is to be installed. Each writes down what it was asked.
SYSTEMCTL = r"""#!/bin/bash
echo "systemctl $*" >> /mnt/calls
at=/mnt/units; mkdir -p $at
name="${*: -1}"
case "$1 $2" in
  "enable --now") touch "$at/$name" ;;
  "disable --now") rm -f "$at/$name" ;;
  is-*) [ -e "$at/$name" ] ;;
esac
"""
NVIDIA_SMI = """#!/bin/bash
case "$1" in
  -L) echo "GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-1)" ;;
  --query-gpu=memory.total) printf '24576\\n24576\\n' ;;
esac
"""
APT_GET = '#!/bin/bash\necho "apt-get $*" >> /mnt/calls\n'
# GitHub's program as far as it is installed: it cannot be downloaded here.
RUNNER = {
    "run.sh": "#!/bin/bash\n",
    "config.sh": r"""#!/bin/bash
echo "config.sh $(id -un) HOME=$HOME $*" >> calls
tr '\0' ' ' < /proc/$PPID/cmdline >> calls
[ "$1" = remove ] && exit 0
[ "$ACTIONS_RUNNER_INPUT_TOKEN" = AAAA ] || exit 1
echo '{"agentName": "desk", "gitHubUrl": "https://github.com/octo/fleet"}' > .runner
""",
    "bin/Runner.Listener": "#!/bin/bash\ntouch /mnt/ran-as-root\n",
    "bin/installdependencies.sh": """#!/bin/bash
echo "dependencies $(id -un) $(stat -c %U .)" >> /mnt/calls
""",
}
# Ends the script that started it, at the worst moment: between download and final name.
KILLS = r"""#!/bin/bash
above=$PPID
while tr '\0' ' ' < /proc/$above/cmdline | grep -q install.sh; do
  next=$(sed -n 's/^PPid:\t//p' /proc/$above/status)
  kill -KILL $above
  above=$next
done
"""


def archive(**files: str) -> bytes:
    """An archive as GitHub's, whose files belong to somebody."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, text in {**RUNNER, **files}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.uid = len(text), 0o755, 1001
            tar.addfile(member, io.BytesIO(text.encode()))
    return data.getvalue()


class Machine:
    """The system here as the lower layer, in a mount namespace that ends with its process."""

    def __init__(self, scratch: Path) -> None:
        """Mount it, and put the checkout into it."""
        script = (
            f"set -e; cd {scratch}; mkdir layers machine; mount -t tmpfs tmpfs layers; "
            "mkdir layers/upper layers/work; "
            "mount -t overlay -o lowerdir=/,upperdir=layers/upper,workdir=layers/work o machine; "
            "mount -t proc proc machine/proc; mount --rbind /dev machine/dev; "
            "mount -t tmpfs tmpfs machine/tmp; mount -t tmpfs tmpfs machine/srv; "
            "echo mounted; exec chroot machine cat"
        )
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.holder.stdout is not None
        assert self.holder.stderr is not None
        if self.holder.stdout.readline() != "mounted\n":
            pytest.skip(f"no overlay can be mounted here: {self.holder.stderr.read().strip()}")
        self.root = Path(f"/proc/{self.holder.pid}/root")
        while Path(f"/proc/{self.holder.pid}/comm").read_text() != "cat\n":
            time.sleep(0.01)
        shutil.copytree(DEPLOYED, self.root / "opt/fleet/deploy/runner")
        for made in ("usr/local/sbin", "run/systemd/system", "run/lock"):
            (self.root / made).mkdir(parents=True, exist_ok=True)
        programs = {"systemctl": SYSTEMCTL, "nvidia-smi": NVIDIA_SMI, "apt-get": APT_GET}
        for name, text in programs.items():
            program = self.root / "usr/local/sbin" / name
            program.write_text(text)
            program.chmod(0o755)
        self.write("mnt/calls", "")
        self.write("mnt/app.pem", KEY)
        self.write("mnt/token", "AAAA\n")
        self.runner = self.offer()

    def end(self) -> None:
        """Let go of the namespace, and with it of every mount."""
        self.holder.kill()
        self.holder.communicate()

    def write(self, path: str, text: str) -> None:
        """Write a file of the machine."""
        (self.root / path).write_text(text)

    def offer(self, version: str = VERSION, **files: str) -> tuple[str, ...]:
        """Put an archive onto the machine; return the options that name it."""
        data = archive(**files)
        name = f"mnt/runner-{version}.tar.gz"
        (self.root / name).write_bytes(data)
        return ("--archive", f"/{name}", "--runner-version", version,
                "--runner-sha256", hashlib.sha256(data).hexdigest())  # fmt: skip

    def do(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run something on the machine, as root."""
        inside = ["nsenter", "--target", str(self.holder.pid), "--mount", "--root", "--wd"]
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
        return subprocess.run(
            [*inside, *argv], capture_output=True, text=True, check=False, timeout=120,
            stdin=subprocess.DEVNULL, env=env,
        )  # fmt: skip

    def install(self, *options: str) -> str:
        """Run the script; it has to succeed."""
        done = self.do(SCRIPT, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def seen(self) -> dict[str, str]:
        """Everything that the script could change: mode, owner, size and time of each file."""
        places = [
            "/etc",
            "/srv",
            "/usr/local/sbin",
            "/opt/fleet",
            "/var/spool",
            "/var/mail",
        ]
        done = self.do("find", *places, "-xdev", "-printf", r"%p\t%m %u %g %s %T@ %l\n")
        lines = (line.partition("\t") for line in done.stdout.splitlines())
        return {path: facts for path, _, facts in lines}

    def calls(self) -> list[str]:
        """What the stand-ins were asked since the last time, but for questions."""
        calls = (self.root / "mnt/calls").read_text().splitlines()
        self.write("mnt/calls", "")
        return [call for call in calls if " is-" not in call]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A machine on which nothing of the fleet is."""
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "runuser", "useradd"))):
        pytest.skip("a mount namespace and users are needed: run the tests as root, on Linux")
    made = Machine(tmp_path)
    try:
        yield made
    finally:
        made.end()


def test_without_apply_everything_is_said_and_nothing_is_changed(machine: Machine) -> None:
    """Of both levels, of a removal, and on a machine that is set up."""
    before = machine.seen()
    for options in (LEVEL_2, LEVEL_1, ("--uninstall", "--purge")):
        told = machine.install(*options, *machine.runner * (options[0] != "--uninstall"))
        assert "Nothing was changed." in told
    assert machine.seen() == before
    told = machine.install(*LEVEL_2, *machine.runner)
    for words in ("useradd --system", "/etc/gguf-fleet/runner.json, mode 644", "enable --now"):
        assert words in told
    assert "secret" not in told
    machine.install(*LEVEL_2, *machine.runner, "--apply")
    before = machine.seen()
    told = machine.install("--uninstall", "--purge")
    for words in ("rm -rf --one-file-system -- /etc/gguf-fleet", "userdel gguf-runner"):
        assert words in told
    assert machine.seen() == before


def test_level_2_ends_with_what_the_units_and_the_hooks_want_and_is_done_once(
    machine: Machine,
) -> None:
    """Root's, closed, and taken by systemd and by the hooks themselves; again changes nothing."""
    told = machine.install(*LEVEL_2, *machine.runner, "--apply")

    assert "hosts:\n  desk: {vram_mib: 49152, runs_on: [self-hosted, gpu, desk]}" in told
    calls = machine.calls()
    assert [call for call in calls if "enable" in call] == [
        "systemctl enable --now gguf-fleet-gpu",
        "systemctl enable --now gguf-fleet-runner-jit",
    ]
    assert "dependencies root root" in calls
    etc = machine.root / "etc/gguf-fleet"
    modes = {each.name: each.stat().st_mode & 0o777 for each in etc.iterdir() if each.is_file()}
    assert modes == {
        "job-started.sh": 0o755, "job-completed.sh": 0o755, "jit-prepare.sh": 0o755,
        "runner_hooks.py": 0o644, "jit_register.py": 0o644, "runner.json": 0o644,
        "runner.version": 0o644, "runner.env": 0o600, "jit.json": 0o600, "app.pem": 0o600,
    }  # fmt: skip
    every = [etc, *etc.rglob("*"), *(machine.root / "srv/gguf-fleet/template").rglob("*")]
    assert {each.stat().st_uid for each in every} == {0}
    hooks = json.loads((etc / "runner.json").read_text())
    jit = json.loads((etc / "jit.json").read_text())
    assert hooks["repositories"] == {"octo/fleet": 7}
    assert (jit["repository"], jit["client_id"], jit["name"]) == ("octo/fleet", "Iv23test", "desk")
    assert jit["labels"] == ["self-hosted", "gpu", "desk"]
    assert machine.do("id", "-Gn", "gguf-runner").stdout == "gguf-runner\n"
    checked = machine.do(SCRIPT, "--check")
    assert (checked.returncode, checked.stderr) == (0, ""), checked.stdout
    assert "jobs of octo/fleet from model-pr.yml, runner-health.yml" in checked.stdout
    if shutil.which("systemd-analyze"):
        # The runner itself is laid out by jit-prepare.sh at each start; everything else is there.
        machine.do("cp", "-a", "/srv/gguf-fleet/template", "/srv/gguf-fleet/runner")
        units = [f"/etc/systemd/system/gguf-fleet-{name}.service" for name in ("gpu", "runner-jit")]
        said = machine.do("systemd-analyze", "verify", "--man=no", *units).stderr.splitlines()
        # Not the one program that is nowhere without a card.
        wrong = [line for line in said if "gguf-fleet" in line and "nvidia-smi" not in line]
        assert wrong == []
    # What GitHub's program left is never run by root.
    assert not (machine.root / "mnt/ran-as-root").exists()

    before = machine.seen()
    told = machine.install(*LEVEL_2, *machine.runner, "--apply")
    assert "\n0 change(s) made" in told
    assert machine.seen() == before
    assert machine.calls() == []


def test_what_an_operator_wrote_is_kept_and_a_second_repository_is_added(machine: Machine) -> None:
    """Secrets, actors, clocks; ours of the same files comes in."""
    machine.install(*LEVEL_2, *machine.runner, "--apply")
    etc = machine.root / "etc/gguf-fleet"
    environment = (etc / "runner.env").read_text() + "AWS_ACCESS_KEY_ID=mine\n"
    (etc / "runner.env").write_text(environment.replace("DVC_SITE_CACHE_DIR", "#"))
    (etc / "runner.env").chmod(0o644)
    hooks = json.loads((etc / "runner.json").read_text())
    (etc / "runner.json").write_text(json.dumps({**hooks, "actors": ["me"], "branches": ["live"]}))
    (etc / "runner_hooks.py").write_text("# of a version before\n")

    told = machine.install(
        "--repository", "octo/more", "--host", "desk", *machine.runner, "--apply"
    )

    assert "AWS_ACCESS_KEY_ID=mine" in (etc / "runner.env").read_text()
    assert (etc / "runner.env").stat().st_mode & 0o777 == 0o600
    assert "runner.env lacks DVC_SITE_CACHE_DIR=" in told
    assert "AWS_ACCESS_KEY_ID" not in told
    now = json.loads((etc / "runner.json").read_text())
    assert (now["actors"], now["branches"]) == (["me"], ["live"])
    assert now["repositories"] == {"octo/fleet": 7, "octo/more": None}
    assert "known by its name alone" in told
    assert "registers with octo/more, and no more with the one in" in told
    assert '+  "repository": "octo/more"' in told
    assert (etc / "runner_hooks.py").read_bytes() == (DEPLOYED / "runner_hooks.py").read_bytes()
    assert "-# of a version before" in told
    assert json.loads((etc / "jit.json").read_text())["repository"] == "octo/more"


def test_level_1_registers_once_as_the_runners_user_and_shows_nobody_the_token(
    machine: Machine,
) -> None:
    """An update keeps registration and work; level 2 takes its place when it is asked for."""
    told = machine.install(*LEVEL_1, *machine.runner, "--apply")

    runner = machine.root / "srv/gguf-fleet/runner"
    calls = (runner / "calls").read_text()
    assert "config.sh gguf-runner HOME=/srv/gguf-fleet/home --unattended" in calls
    assert "--name desk --labels gpu,desk --disableupdate" in calls
    assert "AAAA" not in calls + told
    owner = machine.do("id", "-u", "gguf-runner").stdout.strip()
    assert {str(each.stat().st_uid) for each in [runner, *runner.rglob("*")]} == {owner}
    assert "systemctl enable --now gguf-fleet-runner" in machine.calls()
    assert "0 change(s) made" in machine.install(*LEVEL_1, *machine.runner, "--apply")

    more = [*LEVEL_1[:3], "octo/more", *LEVEL_1[4:]]
    refused = machine.do(SCRIPT, *more, *machine.runner, "--apply")
    assert refused.returncode == 2
    assert "is registered with another repository than octo/more" in refused.stderr

    (runner / "_work").mkdir()
    machine.calls()
    machine.install(
        *LEVEL_1, *machine.offer("2.401.0", **{"run.sh": "#!/bin/bash\n# newer\n"}), "--apply"
    )
    assert "newer" in (runner / "run.sh").read_text()
    assert (runner / "_work").is_dir()
    assert (runner / "calls").read_text() == calls
    assert [call for call in machine.calls() if "able" in call or "stop" in call] == [
        "systemctl stop gguf-fleet-runner",
    ]  # fmt: skip

    told = machine.install(*LEVEL_2, *machine.runner, "--apply")
    assert "to be removed at Settings > Actions > Runners" in told
    assert machine.do(SCRIPT, "--check").returncode == 0
    assert [call for call in machine.calls() if call.startswith("systemctl")][-3:] == [
        "systemctl disable --now gguf-fleet-runner",
        "systemctl daemon-reload",
        "systemctl enable --now gguf-fleet-runner-jit",
    ]
    assert not (machine.root / "mnt/ran-as-root").exists()


def test_a_wrong_archive_or_a_kill_leaves_no_runner_and_the_same_command_goes_on(
    machine: Machine,
) -> None:
    """Nothing is under its final name before all of it is there."""
    template = machine.root / "srv/gguf-fleet/template"
    wrong = [*machine.runner[:-1], "0" * 64]
    done = machine.do(SCRIPT, *LEVEL_2, *wrong, "--apply")
    assert done.returncode == 2
    assert "is not the file that was asked for: sha256 " in done.stderr
    assert not template.exists()
    killed = machine.offer(**{"bin/installdependencies.sh": KILLS})
    assert machine.do(SCRIPT, *LEVEL_2, *killed, "--apply").returncode != 0
    assert not template.exists()
    assert "enable --now gguf-fleet-runner-jit" not in "".join(machine.calls())

    machine.install(*LEVEL_2, *machine.offer(), "--apply")

    assert {each.name for each in template.iterdir()} == {"run.sh", "config.sh", "bin"}
    assert machine.do(SCRIPT, "--check").returncode == 0
    leftover = [each.name for each in (machine.root / "srv/gguf-fleet").iterdir()]
    assert sorted(leftover) == ["cache", "dvc", "home", "template"]


def test_a_check_says_when_a_job_could_change_what_decides_about_jobs(machine: Machine) -> None:
    """By the hooks' own reader; a link in place of a file is refused before any change."""
    machine.install(*LEVEL_2, *machine.runner, "--apply")
    hooks = machine.root / "etc/gguf-fleet/runner.json"
    hooks.chmod(0o666)
    done = machine.do(SCRIPT, "--check")
    assert done.returncode == 1
    assert "writable by nobody else" in done.stderr + done.stdout
    assert "runs as" not in machine.install(*LEVEL_2, *machine.runner, "--apply")
    assert hooks.stat().st_mode & 0o777 == 0o644
    machine.do("usermod", "--append", "--groups", "adm", "gguf-runner")
    refused = machine.do(SCRIPT, *LEVEL_2, *machine.runner, "--apply")
    assert "gpasswd --delete gguf-runner" in refused.stderr
    machine.do("gpasswd", "--delete", "gguf-runner", "adm")
    script = machine.root / "etc/gguf-fleet/job-started.sh"
    script.unlink()
    script.symlink_to("/srv/gguf-fleet/cache/evil")
    refused = machine.do(SCRIPT, *LEVEL_2, *machine.runner, "--apply")
    assert refused.returncode == 2
    assert "job-started.sh is a link" in refused.stderr


def test_a_removal_takes_back_what_was_made_and_models_only_when_asked(machine: Machine) -> None:
    """Afterwards the machine is as before, but for what packages brought."""
    before = machine.seen().keys()
    machine.install(*LEVEL_1, *machine.runner, "--apply")
    (machine.root / "srv/gguf-fleet/dvc/cache/model").write_text("GGUF")

    told = machine.install("--uninstall", "--token-file", "/mnt/token", "--apply")

    assert "--purge removes them" in told
    assert (machine.root / "srv/gguf-fleet/dvc/cache/model").exists()
    assert (
        "config.sh gguf-runner HOME=/srv/gguf-fleet/home remove"
        in (machine.root / "srv/gguf-fleet/runner/calls").read_text()
    )
    assert not (machine.root / "etc/gguf-fleet").exists()
    machine.install("--uninstall", "--purge", "--apply")
    left = machine.seen().keys() - before
    # What useradd keeps of the files before, and the list that cron reads.
    assert {re.sub(r"-$", "", path) for path in left} <= {
        "/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/subuid", "/etc/subgid",
        "/etc/cron.deny",
    }  # fmt: skip
    assert "gguf" not in machine.do("cat", "/etc/passwd", "/etc/group", "/etc/cron.deny").stdout
    assert "0 change(s) made" in machine.install("--uninstall", "--purge", "--apply")


def test_a_machine_without_a_card_and_with_a_disk_of_its_own_is_set_up_and_taken_down(
    machine: Machine,
) -> None:
    """As README.md advises: the disk is mounted first. Who else cron refuses, it refuses still."""
    (machine.root / "usr/local/sbin/nvidia-smi").unlink()
    machine.write("etc/cron.deny", "mallory")
    (machine.root / "srv/gguf-fleet").mkdir()
    mounted = machine.do("mount", "-t", "tmpfs", "tmpfs", "/srv/gguf-fleet")
    assert mounted.returncode == 0, mounted.stderr

    told = machine.install(*LEVEL_2, *machine.runner, "--apply")

    assert re.search(r"desk: \{memory_mib: [1-9]\d*, runs_on: \[self-hosted, gpu, desk\]\}", told)
    assert (machine.root / "etc/cron.deny").read_text() == "mallory\ngguf-runner\n"
    told = machine.install("--uninstall", "--purge", "--apply")
    assert "is a disk of its own: umount it" in told
    assert list((machine.root / "srv/gguf-fleet").iterdir()) == []
    assert (machine.root / "etc/cron.deny").read_text() == "mallory\n"
    assert "gguf" not in machine.do("cat", "/etc/passwd").stdout


def test_what_grows_is_removed_after_its_time_and_nothing_through_a_link(machine: Machine) -> None:
    """By systemd-tmpfiles itself, with the installed file."""
    if shutil.which("systemd-tmpfiles") is None:
        pytest.skip("systemd-tmpfiles is not installed")
    machine.install(*LEVEL_1, *machine.runner, "--apply")
    old, young = time.time() - 15 * 86400, time.time() - 13 * 86400
    srv = machine.root / "srv/gguf-fleet"
    owner = srv.joinpath("home").stat().st_uid
    (srv / "precious").mkdir()
    for name, when in {
        "runner/_diag/Worker_old.log": old, "runner/_diag/Worker_young.log": young,
        "runner/.credentials": old, "dvc/cache/model": old, "precious/old": old,
    }.items():  # fmt: skip
        (srv / name).parent.mkdir(exist_ok=True)
        (srv / name).write_text("x")
        os.chown(srv / name, owner, owner)
        os.chown((srv / name).parent, owner, owner)
        os.utime(srv / name, (when, when))
    (srv / "cache/uploads").symlink_to("/srv/gguf-fleet/precious")

    machine.do("systemd-tmpfiles", "--clean", "/etc/tmpfiles.d/gguf-fleet.conf")

    assert [each.name for each in (srv / "runner/_diag").iterdir()] == ["Worker_young.log"]
    for kept in ("runner/.credentials", "dvc/cache/model", "precious/old"):
        assert (srv / kept).exists(), kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--repository", "octo"), "OWNER/REPO"),
        (("--repository", "octo/fleet; rm -rf /"), "OWNER/REPO"),
        (("--repository", "octo/fleet", "--host", "De sk"), "--host"),
        (("--repository", "octo/fleet", "--host", "desk", "--level", "3"), "--level is 1 or 2"),
        (("--repository", "octo/fleet", "--host", "desk"), "level 2 needs --key"),
        ((*LEVEL_1, "--label", "a,b"), "--label a,b"),
        ((*LEVEL_1, "--repository-id", "seven"), "has to be a number"),
        ((*LEVEL_1, "--runner-version", "2.1.0"), "needs --runner-sha256"),
        ((*LEVEL_1, "--archive", "/nowhere"), "there is no such file"),
        ((*LEVEL_1, "--aply"), "--aply is no option"),
        (("--repository",), "--repository needs a value"),
    ],
)
def test_a_slip_is_said_before_the_first_step(options: tuple[str, ...], words: str) -> None:
    """With what to do next, and an exit code of its own."""
    done = subprocess.run(
        [DEPLOYED / "install.sh", *options], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "▸" not in done.stdout
