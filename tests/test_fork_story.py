"""
A fork's whole life, as its operator types it: from the template to the template's next version.

Everything is real and of the fork itself: its own code, git, DVC, llama.cpp, the engine. GitHub has
no part in it, and nothing asks a network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import act
import pytest
import sample
from test_chain import FEW, QUICK
from test_upstream_story import nudged

from pipelines import __version__, owners

if TYPE_CHECKING:
    from pipelines.toolchain import Toolchain

pytestmark = [pytest.mark.toolchain, pytest.mark.alone, pytest.mark.timeout(1800)]

MODEL: Final = "story-llama"
SOURCE: Final = f"of-the-story/{MODEL}"
NEXT: Final = "99.0.0"
OF_TRAINING: Final = (".py", ".toml")
RELEASED: Final = re.compile(rf"{MODEL}: released (\w+) \(stable\) in local")
ATTEMPTS: Final = 3
ALWAYS: Final = {"machine", "check-upstream"}


@dataclass(frozen=True)
class Life:
    """A fork that lived: where it is, and what each command of its operator printed."""

    root: Path
    template: Path
    said: dict[str, str]
    held: dict[str, dict[str, bytes]]


def typed(root: Path, *argv: str, module: str = "pipelines") -> str:
    """Type a command in a checkout, whose own code it runs."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), env["PATH"]))
    done = subprocess.run(
        [sys.executable, "-m", module, *argv],
        cwd=root, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{said[-4000:]}"
    return done.stdout if "--json" in argv else said


def commit(root: Path, message: str) -> None:
    """Commit all there is, if that is something."""
    act.git(root, "add", "-A")
    if act.git(root, "status", "--porcelain"):
        act.commit(root, message)


def of_operator(root: Path) -> dict[str, bytes]:
    """Return what the operator owns, as committed."""
    names = act.git(root, "ls-files", "-z").split("\0")
    return {name: (root / name).read_bytes() for name in names if owners.is_operators(name)}


def publish_next(template: Path) -> None:
    """Let the template's owners go on: code, pages, and, of their own fleet, what is theirs."""
    package = template / "pipelines/__init__.py"
    package.write_text(package.read_text().replace(f'"{__version__}"', f'"{NEXT}"'))
    (template / "docs/new-page.md").write_text("# A new page\n\nOf the template.\n")
    with (template / "pipelines/wording.py").open("a") as code:
        code.write("\n# A comment of the next version.\n")
    (template / "README.md").unlink()
    for name in ("params.yaml", "results/report.md", ".github/CODEOWNERS"):
        path = template / name
        path.write_text(f"{path.read_text()}# Changed by the owners of the template.\n")
    commit(template, "The next version")
    act.git(template, "tag", "-a", "-m", NEXT, f"v{NEXT}")


def hurried(root: Path) -> None:
    """Measure little: this is about what happens, not about how fast the model is."""
    path = root / "params.yaml"
    text = path.read_text()
    for key, value in QUICK.items():
        text, count = re.subn(rf"\b({key}: )(?:\[[^\]]*\]|[^,}}\n#]+)", rf"\g<1>{value}", text)
        assert count, key
    few = FEW.replace("degenerate_prompts: 8", "degenerate_prompts: 24")
    text, count = re.subn(r"^  concurrency: .*\n", few, text, flags=re.MULTILINE)
    assert count == 1
    # What 20 requests can show.
    text, count = re.subn(r"slo: \{", "slo: {min_goodput: 0.8, ", text)
    assert count == 1
    path.write_text(text)


def released(root: Path) -> str:
    """Run the chain until it ends in a release: what disturbs this machine makes it INVALID."""
    said = ""
    for _ in range(ATTEMPTS):
        said += typed(root, "repro")
        if RELEASED.search(said):
            return said
    pytest.fail(f"the machine was never quiet: {said[-4000:]}")


def ran(said: str) -> set[str]:
    """Return the stages that ran, without those that look around every time."""
    return set(re.findall(r"^✓ (\S+) +done in", said, re.MULTILINE)) - ALWAYS


def begun(place: Path) -> tuple[Path, Path]:
    """Make a template with a version, and what "Use this template" makes of it: one new commit."""
    template = act.fork(place / "template", leave_out=())
    sample.lay(template)
    commit(template, "The template")
    act.git(template, "tag", "-a", "-m", __version__, f"v{__version__}")
    root = place / "mine"
    shutil.copytree(template, root, ignore=shutil.ignore_patterns(".git"))
    act.git(root, "init", "-q", "-b", "main")
    act.git(root, "config", "user.name", "Operator")
    act.git(root, "config", "user.email", "operator@example.invalid")
    commit(root, "Initial commit")
    return template, root


def put_model(root: Path) -> None:
    """Bring a model of one's own, as a folder of the repository."""
    (root / SOURCE).mkdir(parents=True)
    for path in sorted((act.ROOT / "examples/tiny-llama").iterdir()):
        if path.is_file() and not path.name.endswith(OF_TRAINING):
            shutil.copy(path, root / SOURCE / path.name)
    change_weights(root)


def change_weights(root: Path, tensor: str = "model.norm.weight") -> None:
    """Train it a little."""
    path = root / SOURCE / "model.safetensors"
    before = path.read_bytes()
    (length,) = struct.unpack_from("<Q", before)
    assert tensor in json.loads(before[8 : 8 + length])
    path.write_bytes(nudged(before, tensor))


@pytest.fixture(scope="module", name="life")
def _life(tools: Toolchain, tmp_path_factory: pytest.TempPathFactory) -> Life:
    assert tools.tool("llama-quantize").exists()
    place = tmp_path_factory.mktemp("life")
    template, root = begun(place)
    said: dict[str, str] = {}
    held: dict[str, dict[str, bytes]] = {}

    put_model(root)
    said["init"] = typed(
        root, "init", f"path:{SOURCE}", "--name", MODEL, "--quants", "Q8_0,Q4_K_M",
        "--host", "desk", "--memory", "4096", "--owner", "@me", "--yes",
    )  # fmt: skip
    hurried(root)
    said["check"] = typed(root, "check")
    commit(root, "Our fleet")
    said["doctor"] = typed(root, "doctor", "--offline", "--json")
    said["repro"] = released(root)
    commit(root, "What it found")

    change_weights(root, "model.layers.0.input_layernorm.weight")
    said["bump"] = typed(root, "bump", MODEL, "--local")
    act.git(root, "switch", "-q", f"bump/{MODEL}")
    commit(root, "New weights")
    said["repro of the bump"] = released(root)
    commit(root, "What that found")
    said["comment"] = typed(root, "comment", "--dry-run", "--base", "main")
    act.git(root, "switch", "-q", "main")
    act.git(root, "merge", "-q", "--ff-only", f"bump/{MODEL}")

    held["before the rollback"] = of_operator(root)
    said["rollback"] = typed(
        root, "rollback", MODEL, "--to", "previous", "--reason", "answers got worse"
    )
    said["repro of the rollback"] = typed(root, "repro")
    commit(root, "Back")

    publish_next(template)
    held["before the update"] = of_operator(root)
    said["update"] = typed(root, "template", "update", "--from", str(template))
    held["after the update"] = of_operator(root)
    said["check after the update"] = typed(root, "check")
    said["repro after the update"] = typed(root, "repro")
    said["doctor at the end"] = typed(root, "doctor", "--offline", "--json")
    return Life(root, template, said, held)


def test_a_new_fork_has_the_operators_model_and_nothing_of_the_example(life: Life) -> None:
    """Its declaration is of one model, with comments; records and lock of the example are gone."""
    text = life.held["before the rollback"]["params.yaml"].decode()
    assert f"path:{SOURCE}" in text
    assert "tiny-llama" not in text
    assert text.count("#") > 5
    names = act.git(life.root, "ls-files").split("\n")
    assert not [name for name in names if name.startswith("results/tiny-llama")]
    assert "tiny-llama" not in (life.root / "dvc.lock").read_text()
    assert "@me" in (life.root / ".github/CODEOWNERS").read_text()


def test_the_doctor_finds_nothing_that_fails_at_the_beginning_and_at_the_end(life: Life) -> None:
    """Warnings say what is not done yet; a fix stands beside each."""
    for when in ("doctor", "doctor at the end"):
        lines: list[dict[str, Any]] = json.loads(
            life.said[when][: life.said[when].rindex("}") + 1]
        )["lines"]
        assert {line["area"] for line in lines} >= {"machine", "repository"}
        assert [line for line in lines if line["state"] == "fail"] == []
        assert all(line["fix"] for line in lines if line["state"] == "warn")


def test_a_new_model_is_measured_and_released_and_so_is_its_bump(life: Life) -> None:
    """The first release, and after other weights another one, by one changed line."""
    first, second = (
        set(RELEASED.findall(life.said[when])) for when in ("repro", "repro of the bump")
    )
    assert len(first) == 1
    assert len(second) == 1
    assert first != second
    assert f"quantize@{MODEL}-Q4_K_M" in ran(life.said["repro of the bump"])


def test_the_comment_tells_the_bump_from_two_commits(life: Life) -> None:
    """What changed, the verdict, and the line that goes back."""
    comment = life.said["comment"]
    assert MODEL in comment
    assert "promote" in comment
    assert f"fleet rollback {MODEL} --to" in comment


def test_a_rollback_makes_nothing_again(life: Life) -> None:
    """One line of params.yaml and the ledger; no GGUF is quantized or measured."""
    assert ran(life.said["repro of the rollback"]) <= {
        f"publish@{MODEL}", f"track@{MODEL}", "report"
    }  # fmt: skip
    before, after = (
        life.held[when]["params.yaml"].decode().splitlines()
        for when in ("before the rollback", "before the update")
    )
    assert len([line for line in after if line not in before]) == 1


def test_the_next_template_comes_without_a_conflict_and_touches_nothing_of_the_operator(
    life: Life,
) -> None:
    """Code and pages are the new ones, a removed page is gone, and every record is as it was."""
    assert life.held["after the update"] == life.held["before the update"]
    assert f'"{NEXT}"' in (life.root / "pipelines/__init__.py").read_text()
    assert (life.root / "docs/new-page.md").exists()
    assert not (life.root / "README.md").exists()
    assert "Changed by the owners" not in (life.root / "params.yaml").read_text()


def test_after_the_update_nothing_has_to_run(life: Life) -> None:
    """Edited code is no edited input: no stage runs, and the checkout is clean."""
    assert ran(life.said["repro after the update"]) == set()
    assert act.git(life.root, "status", "--porcelain") == ""
