"""`fleet doctor`: one planted fault gives its very line and its fix; what is well fails nothing."""

from __future__ import annotations

import email.utils
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nvml_replay
import pytest
import sample
import small_disk
import yaml

from pipelines import (
    __version__,
    doctor_lines,
    doctor_machine,
    doctor_objects,
    doctor_repository,
    gpu,
    health_probe,
    machine,
    orphans,
    schema,
    toolchain,
)
from pipelines.__main__ import main
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from registry_servers import S3Server

    from pipelines.doctor_lines import Line

ROOT = Path(__file__).resolve().parent.parent
_PARTS = (
    *sample.CHECKOUT, ".github", "actions", "checks", "docs", "results", "dvc.lock", "Makefile",
    "requirements.lock", "pyproject.toml", "params.schema.json", "release.schema.json",
    ".gitattributes",
)  # fmt: skip
_GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.invalid")
MODEL = "tiny-llama"
LEDGER = f"results/{MODEL}/ledger.jsonl"
_OBJECTS = ".dvc/cache/files/md5"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fork that has measured its model: everything in git, every object in DVC's cache."""
    root = tmp_path_factory.mktemp("doctor") / "fleet"
    sample.take(root, *_PARTS, frozen=True)
    # In a checkout that somebody works in they may be older than the code.
    schema.write(root)
    for argv in (["init", "-qb", "main"], ["add", "-A"], ["commit", "-qm", "our fleet"]):
        subprocess.run([*_GIT, *argv], cwd=root, check=True)
    _lay_objects(root)
    return root


def _lay_objects(root: Path) -> None:
    """Lay files of the right names and sizes where DVC keeps what dvc.lock names."""
    for entry in yaml.safe_load((root / "dvc.lock").read_text())["stages"].values():
        for out in entry["outs"]:
            if out["path"].startswith("work/") and "track" not in out["path"]:
                path = root / _OBJECTS / out["md5"][:2] / out["md5"][2:]
                path.parent.mkdir(parents=True, exist_ok=True)
                is_folder = out["md5"].endswith(".dir")
                path.write_bytes(b"[]") if is_folder else path.touch()
                os.truncate(path, 2 if is_folder else out["size"])


@pytest.fixture
def fleet(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That fork as the working directory; whatever a test breaks in it is put back."""
    for name in ("GITHUB_REPOSITORY", "GITHUB_TOKEN", "GH_TOKEN", "GITHUB_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RUNNER_ENVIRONMENT", raising=False)
    monkeypatch.chdir(built)
    yield built
    if not (built / ".git").exists():
        (built / "gone").rename(built / ".git")
    for argv in (["reset", "-q", "--hard"], ["clean", "-fdxq", "-e", ".dvc/cache"]):
        subprocess.run([*_GIT, *argv], cwd=built, check=True)


def repository(look: str, *, offline: bool = True) -> dict[str, Line]:
    """What one look at the repository in the working directory says, by name of the line."""
    declared, told = doctor_repository.declared(Layout())
    if look == "declaration":
        return _worst(told)
    looks = doctor_repository.looks(Layout(), declared, bare=False, offline=offline)
    return _worst(doctor_lines.looked("repository", look, looks[look]))


def of_machine(look: str, *, offline: bool = True) -> dict[str, Line]:
    """What one look at the machine says, for the fleet in the working directory."""
    declared, _ = doctor_repository.declared(Layout())
    waiting = doctor_machine.looks_that_wait(Layout(), declared, offline=offline)
    looks = doctor_machine.looks(Layout(), declared) | waiting
    return _worst(doctor_lines.looked("machine", look, looks[look]))


def _worst(lines: list[Line]) -> dict[str, Line]:
    order = ("ok", "warn", "fail")
    return {line.name: line for line in sorted(lines, key=lambda each: order.index(each.state))}


# --- a fork that is well ----------------------------------------------------------------------


def test_a_healthy_fleet_gives_no_failure_and_every_other_line_a_fix(
    fleet: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The whole verb, as it is typed; afterwards the checkout is as it was."""
    assert main(["doctor", "--offline", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["schema_version"], told["exit_code"], told["fail"]) == (1, 0, 0)
    names = {line["name"] for line in told["lines"]}
    assert names >= {
        "python", "packages", "driver", "disk-work", "disk-speed", "dvc-link", "git", "tools",
        "declaration", "committed", "lock", "objects", "remote", "ledger", "pins", "generated",
        "owners", "workflows", "toolchain", "template",
    }  # fmt: skip
    for line in told["lines"]:
        assert bool(line["fix"]) == (line["state"] != "ok"), line
    objects = next(line for line in told["lines"] if line["name"] == "objects")
    assert objects["text"].endswith("of dvc.lock are in the cache")
    assert not list((fleet / "work").glob(".fleet-*"))
    status = subprocess.run(
        ["git", "status", "--short"], cwd=fleet, capture_output=True, check=True
    )
    assert status.stdout == b""
    assert main(["doctor", "--offline", "--strict"]) == (5 if told["warn"] else 0)
    page = capfd.readouterr().out
    assert page.rstrip().endswith(f"{told['ok']} ok, {told['warn']} warnings, 0 failures")


def test_a_fork_before_its_first_run_fails_nothing(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Nothing measured, nothing built, nothing on GitHub: each is a warning with what to type."""
    shutil.rmtree(fleet / "results")
    (fleet / "dvc.lock").unlink()
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "empty"))
    assert main(["doctor"]) == 0
    page = capfd.readouterr().out
    for name, fix in {
        "lock": "fleet repro",
        "toolchain": "fleet toolchain    # 9 to 17 minutes",
        "owners": "fleet init",
    }.items():
        said = page[page.index(f"\n  warn  {name} ") :].splitlines()
        assert said[2].split("fix:")[1].strip().startswith(fix), said[:3]
    assert "fail" not in page.replace("0 failures", "")
    assert main(["doctor", "--security"]) == 0
    told = capfd.readouterr().out
    assert "security\n  warn  level" in told
    assert "machine\n" not in told


def test_a_fresh_clone_has_lost_nothing_that_was_never_pushed(fleet: Path, tmp_path: Path) -> None:
    """Nothing anywhere, and no remote that clones reach: a run makes it. Else it is lost."""
    cache, aside = fleet / ".dvc/cache", fleet / ".dvc/tmp/aside"
    aside.parent.mkdir(exist_ok=True)
    cache.rename(aside)
    try:
        line = repository("lock")["objects"]
        assert (line.state, line.exit_code) == ("warn", 0), line
        assert line.fix.startswith("fleet repro ")
        (tmp_path / "store").mkdir()
        _another_remote(str(tmp_path / "store"))(fleet)
        line = repository("lock")["objects"]
        assert (line.state, line.exit_code) == ("fail", 8), line
        (fleet / ".dvc/config.local").unlink()
        (kept,) = (path for path in sorted(aside.rglob("*.dir"))[:1])
        there = fleet / ".dvc/remote/files/md5" / kept.parent.name / kept.name
        there.parent.mkdir(parents=True)
        shutil.copy(kept, there)
        line = repository("lock")["objects"]
        assert (line.state, line.exit_code) == ("fail", 8), line
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        aside.rename(cache)


@pytest.mark.usefixtures("fleet")
def test_an_engine_that_can_be_built_is_one_command_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go is here: nobody has to install anything. Neither is: somebody has to."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "empty"))
    exists = Path.exists
    with monkeypatch.context() as only:
        only.setattr(Path, "exists", lambda path: "/go/bin/" not in str(path) and exists(path))
        only.setenv("PATH", str(tmp_path))
        neither = of_machine("engine")["engine"]
        (tmp_path / "go").write_text("#!/bin/sh\n")
        (tmp_path / "go").chmod(0o755)
        with_go = of_machine("engine")["engine"]
    assert (neither.state, neither.fix.startswith("Install Ollama")) == ("fail", True), neither
    assert (with_go.state, with_go.fix.startswith("fleet toolchain")) == ("warn", True), with_go


# --- whose code runs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("venv", "fix"),
    [
        ("none", "make setup\n. .venv/bin/activate"),
        ("own", ". .venv/bin/activate"),
        ("link", "rm "),
    ],
)
def test_the_code_of_another_checkout_is_a_failure_and_judges_no_page(
    fleet: Path, tmp_path: Path, venv: str, fix: str
) -> None:
    """A console script of another environment, typed here, would measure by its own rules."""
    assert repository("code")["code"].state == "warn"  # the same bytes, elsewhere
    (fleet / "pipelines/layout.py").write_text('"""Another version."""\n')
    _edit("params.schema.json", '"title": "params.yaml"', '"title": "fleet"')(fleet)
    place = tmp_path if venv == "link" else fleet / ".venv"
    if venv != "none":
        (place / "bin").mkdir(parents=True)
        (place / "bin/activate").touch()
    if venv == "link":
        (fleet / ".venv").symlink_to(place)
    try:
        line = repository("code")["code"]
    finally:
        (fleet / ".venv").unlink() if venv == "link" else None
    assert (line.state, line.exit_code) == ("fail", 2)
    assert line.text.startswith("the code that runs is that of ANOTHER checkout")
    assert str(ROOT) in line.text
    assert line.fix.startswith(fix)
    assert repository("generated") == {}


def test_every_verb_warns_where_another_checkouts_code_runs(fleet: Path) -> None:
    """As a console script does it: it does not begin to look in the working directory."""
    script = "import sys; from pipelines.__main__ import main; sys.exit(main())"
    for place, warns in ((ROOT, False), (fleet, True)):
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, "digest", f"examples/{MODEL}"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("ANOTHER checkout" in done.stderr) == warns, done.stderr


# --- the repository ---------------------------------------------------------------------------


def test_the_way_back_to_a_declaration_is_one_that_works(fleet: Path) -> None:
    """In the last commit, in the one before, in none: each line is pasted, and brings it back."""
    head = _said(fleet, "rev-parse", "HEAD")
    try:
        for step in ("removed", "committed", "never"):
            if step == "committed":
                subprocess.run([*_GIT, "commit", "-qam", "gone"], cwd=fleet, check=True)
            if step == "never":
                (fleet / "tests/sample").mkdir(parents=True)
                shutil.copy(fleet / "params.yaml", fleet / "tests/sample/params.yaml")
                (fleet / ".git").rename(fleet / "gone")
            (fleet / "params.yaml").unlink(missing_ok=True)
            line = repository("declaration")["declaration"]
            assert line.state == "fail"
            assert "fleet init" not in line.fix
            assert (
                "committed" not in repository("git")
                or step == "never"
                or ("params.yaml" not in repository("git")["committed"].fix)
            )
            subprocess.run(["sh", "-c", line.fix], cwd=fleet, check=True, capture_output=True)
            assert repository("declaration")["declaration"].state != "fail"
            if step == "removed":
                (fleet / "params.yaml").unlink()
    finally:
        if (fleet / "gone").exists():
            (fleet / "gone").rename(fleet / ".git")
        subprocess.run([*_GIT, "reset", "-q", "--hard", head], cwd=fleet, check=True)


def _said(root: Path, *words: str) -> str:
    done = subprocess.run([*_GIT, *words], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _edit(path: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace the first of a text in a file of the fork."""

    def edit(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return edit


def _another_remote(url: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / ".dvc/config.local"
        path.write_text(f"['remote \"local\"']\n    url = {url}\n")

    return edit


FAULTS: dict[str, tuple[Callable[[Path], object], str, str, str, str, int]] = {
    # what is broken: how, look and line, state, words of it, words of its fix, exit code
    "a pin that was edited": (
        _edit(".github/workflows/ci.yml", "uses: actions/checkout@", "uses: actions/checkout@0"),
        "pins", "fail", "ci.yml", "make check", 2,
    ),
    "a stale schema": (
        _edit("params.schema.json", '"title": "params.yaml"', '"title": "fleet"'),
        "generated", "fail", "params.schema.json", "fleet schema --write", 2,
    ),
    "code that nobody owns": (
        lambda root: (root / ".github/CODEOWNERS").write_text("/corpora/ @OWNER/writers\n"),
        "owners", "fail", "Nobody owns /", "make check", 2,
    ),
    "a workflow that may write": (
        _edit(".github/workflows/ci.yml", "permissions: {}", "permissions: write-all"),
        "workflows", "fail", "ci.yml", "make check", 2,
    ),
    "a ledger line that was changed": (
        _edit(LEDGER, '"kind":"move"', '"kind":"m0ve"'),
        "ledger", "fail", "ledger.jsonl:", "git", 8,
    ),
    "a key that nobody knows": (
        _edit("params.yaml", "\nserving:", "\nservings:"),
        "declaration", "fail", 'did you mean "serving"', "fleet check", 2,
    ),
    "a corpus that is not the declared one": (
        lambda root: (root / "corpora/evaluation.txt").write_text("another text\n"),
        "declaration", "fail", "params.yaml:", "fleet check", 2,
    ),
    "no declaration": (
        lambda root: (root / "params.yaml").unlink(),
        "declaration", "fail", "no params.yaml", "git checkout HEAD -- params.yaml", 2,
    ),
    "a gate that was changed since": (
        _edit("params.yaml", "min_same_top: 0.94", "min_same_top: 0.93"),
        "lock", "warn", f"choose@{MODEL} has to run", "fleet repro", 0,
    ),
    "a fork before its first run": (
        lambda root: (root / "dvc.lock").unlink(),
        "lock", "warn", "nothing was measured yet", "fleet repro", 0,
    ),
    "a lock that git merged by text": (
        _edit("dvc.lock", "stages:", "<<<<<<< HEAD\nstages:"),
        "lock", "fail", "dvc.lock is not what DVC writes", "fleet repro", 2,
    ),
    "a lock that a kill cut": (
        lambda root: (root / "dvc.lock").write_text(""),
        "killed", "warn", "dvc.lock is empty", "fleet repro", 0,
    ),
    "a record that is not in git": (
        lambda root: (root / "results/note.json").write_text("{}"),
        "committed", "warn", "results/note.json", "git add -- results/", 0,
    ),
    "a source of a model that is not in git": (
        lambda root: (root / f"examples/{MODEL}/extra.txt").write_text("more\n"),
        "committed", "warn", f"examples/{MODEL}/extra.txt", f"git add -- examples/{MODEL}/", 0,
    ),
    "no repository of git": (
        lambda root: (root / ".git").rename(root / "gone"),
        "git", "fail", "no git repository", "git init", 2,
    ),
    "a remote that is not mounted": (
        _another_remote("/nowhere/at/all"),
        "remote", "fail", "/nowhere/at/all, which is not there", "mkdir -p '/nowhere/at/all'", 8,
    ),
    "no remote": (
        _edit(".dvc/config", "remote = local", "site_cache_dir = ''"),
        "remote", "warn", "none is configured", "dvc remote add --default", 0,
    ),
    "a configuration that git merged by text": (
        lambda root: (root / ".dvc/config").write_text("<<<<<<< HEAD\n"),
        "dvc-config", "fail", ".dvc/config cannot be read", "git checkout HEAD -- .dvc/config", 2,
    ),
    "a graph that was cut": (
        lambda root: (root / "dvc.yaml").write_text("stages:\n  fetch: {}\n"),
        "graph", "fail", "dvc.yaml has no stage `fetch`", "git checkout HEAD -- dvc.yaml", 2,
    ),
    "a ledger that is a folder": (
        lambda root: (root / "results/other/ledger.jsonl").mkdir(parents=True),
        "ledger", "fail", "Is a directory", "fleet doctor", 7,
    ),
    "no workflows": (
        lambda root: shutil.rmtree(root / ".github/workflows"),
        "workflows", "warn", "nothing runs on GitHub", "git checkout HEAD -- .github", 0,
    ),
}  # fmt: skip


def test_a_login_in_a_configuration_that_cannot_be_read_is_not_shown(fleet: Path) -> None:
    """.dvc/config.local holds it; what a doctor prints goes into an issue."""
    for text in ("secret_access_key = hunter2\n", "['remote \"s3\"']\nhunter2\n"):
        (fleet / ".dvc/config.local").write_text(text)
        line = repository("dvc-config")["dvc-config"]
        assert line.state == "fail"
        assert "in line " in line.text
        assert "hunter2" not in line.text


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_with_what_to_paste(fleet: Path, fault: str) -> None:
    """One thing at a time, and the code with which a run would stop there."""
    plant, name, state, words, fix, code = FAULTS[fault]
    plant(fleet)
    looks = {"pins": "workflows", "owners": "workflows", "remote": "lock", "committed": "git"}
    line = repository(looks.get(name, name))[name]
    assert (line.state, line.exit_code) == (state, code), line
    assert words in line.text
    assert fix in line.fix


@pytest.fixture
def f16(fleet: Path) -> Iterator[Path]:
    """The object of the converted model, put back afterwards."""
    lock = yaml.safe_load((fleet / "dvc.lock").read_text())["stages"]
    oid = lock[f"convert@{MODEL}"]["outs"][-1]["md5"]
    path = fleet / _OBJECTS / oid[:2] / oid[2:]
    kept = path.with_suffix(".kept")
    shutil.copy(path, kept)
    yield path
    kept.replace(path)


def test_a_remote_on_a_disk_that_never_answers_is_a_warning_and_no_hang(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an NFS server that is gone, which no program survives that looks at it."""
    store = tmp_path / "store"
    _another_remote(str(store))(fleet)
    gone = threading.Event()
    size = doctor_objects._size

    def hanging(path: Path) -> int | None:
        if path.is_relative_to(store):
            gone.wait(30)
        return size(path)

    monkeypatch.setattr(doctor_objects, "_size", hanging)
    monkeypatch.setattr(doctor_objects, "ANSWER_WITHIN_S", 0.1)
    try:
        line = repository("lock")["remote"]
    finally:
        gone.set()
    assert line.state == "warn"
    assert "no answer within" in line.text
    assert str(store) in line.fix


def test_an_object_is_told_by_where_it_still_is(fleet: Path, f16: Path, tmp_path: Path) -> None:
    """Nowhere, in work/ alone, in the remote, cut: each has another way back."""
    path = f"work/{MODEL}/f16.gguf"
    whole = f16.read_bytes()
    os.truncate(f16, 100)
    cut = repository("lock")["objects"]
    assert (cut.state, cut.exit_code) == ("fail", 6)
    assert "another size" in cut.text
    assert f16.name in cut.fix
    assert "fleet repro" in cut.fix

    f16.unlink()
    lost = repository("lock")["objects"]
    assert (lost.state, lost.exit_code) == ("fail", 8)
    assert "nowhere" in lost.text
    assert path in lost.text
    assert lost.fix.startswith("fleet repro")

    (fleet / path).parent.mkdir(parents=True)
    (fleet / path).write_bytes(whole)
    laid = repository("lock")["objects"]
    # With --force DVC would take any file of that size for the one that was measured.
    assert laid.state == "warn"
    assert laid.fix.startswith(f"dvc commit {path}    #")
    assert "--force" not in laid.fix
    shutil.rmtree(fleet / "work")

    store = tmp_path / "store"
    _another_remote(str(store))(fleet)
    there = store / "files/md5" / f16.parent.name / f16.name
    there.parent.mkdir(parents=True)
    there.write_bytes(whole)
    found = repository("lock")
    assert (found["objects"].state, found["objects"].fix) == ("warn", "dvc pull --allow-missing")
    assert "in the remote local" in found["objects"].text
    # What nobody pushed, nobody else can have.
    assert (found["remote"].state, found["remote"].fix) == ("warn", "dvc push")


def test_a_remote_on_a_server_is_asked_through_dvc(
    fleet: Path, f16: Path, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 says what it has; one that refuses is a failure; offline nobody is asked."""
    for name, value in moto_s3.environment.items():
        if not name.endswith("_FILE"):  # DVC's client takes none that is empty
            monkeypatch.setenv(name, value)
    bucket, client = moto_s3.new_bucket(), moto_s3.client()
    key = f"fleet/files/md5/{f16.parent.name}/{f16.name}"
    client.put_object(Bucket=bucket, Key=key, Body=f16.read_bytes())
    client.close()
    f16.unlink()
    config = fleet / ".dvc/config.local"
    text = (
        f"['remote \"local\"']\n    url = s3://{{}}/fleet\n    endpointurl = {moto_s3.endpoint}\n"
    )
    config.write_text(text.format(bucket))
    told = repository("lock", offline=False)
    assert (told["objects"].state, told["objects"].fix) == ("warn", "dvc pull --allow-missing")
    assert (told["remote"].state, told["remote"].fix) == ("warn", "dvc push")
    assert told["remote"].text == f"local is s3://{bucket}/fleet; 1 of 8 objects are in it"

    config.write_text(text.format("user:secret@nobody"))
    offline = repository("lock", offline=True)
    assert (offline["objects"].state, offline["remote"].state) == ("warn", "ok")
    assert "could not be asked" in offline["objects"].text
    assert "not asked" in offline["remote"].text
    assert "secret" not in offline["remote"].text

    config.write_text(text.format("nobody"))
    refused = repository("lock", offline=False)["remote"]
    assert (refused.state, refused.exit_code) == ("fail", 8)
    assert "s3://nobody/fleet; it cannot be read" in refused.text
    assert "NoSuchBucket" in refused.text


def test_a_folder_of_this_checkout_is_no_remote_for_runners(fleet: Path) -> None:
    """Green for its author, missing for everybody else."""
    add = ["remote", "add", "origin", "https://github.com/OWNER/fleet.git"]
    subprocess.run([*_GIT, *add], cwd=fleet, check=True)
    try:
        line = repository("lock")["remote"]
        assert line.state == "warn"
        assert "no runner can get anything from it" in line.text
        assert line.fix.startswith("dvc remote modify local url")
    finally:
        subprocess.run([*_GIT, "remote", "remove", "origin"], cwd=fleet, check=True)


def test_a_tool_that_was_changed_is_a_digest_error(
    fleet: Path,  # noqa: ARG001 - the working directory
    tools: toolchain.Toolchain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One byte of one program; and one that is not built is built by its fix."""
    prefix = tmp_path / "prefix"
    shutil.copytree(tools.prefix, prefix, symlinks=True, copy_function=os.link)
    changed = prefix / "bin/llama-bench"
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.unlink()
    changed.write_bytes(data)
    broken = toolchain.Toolchain(prefix=prefix, manifest=tools.manifest)
    monkeypatch.setattr(toolchain, "there", lambda _spec: broken)
    line = repository("toolchain")["toolchain"]
    assert (line.state, line.exit_code) == ("fail", 6)
    assert line.fix == f"rm -r '{prefix}'\nfleet toolchain"
    monkeypatch.undo()
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "empty"))
    line = repository("toolchain")["toolchain"]
    assert (line.state, line.fix.split("  ")[0]) == ("warn", "fleet toolchain")


def test_what_a_killed_run_left_at_work_is_said(fleet: Path) -> None:
    """It would write beside the next run, which ends it first."""
    dead = orphans.mark(fleet).replace(f":{os.getpid()}:", f":{2**22 + 1}:")
    sleeper = subprocess.Popen(["sleep", "60"], env={**os.environ, orphans.MARK_ENV: dead})
    try:
        line = repository("killed")["killed"]
        assert (line.state, line.fix.split("  ")[0]) == ("warn", "fleet repro")
        assert line.text.startswith("1 program of a killed run")
    finally:
        sleeper.kill()
        sleeper.wait()
    assert repository("killed") == {}


def test_a_newer_version_of_the_template_is_said_without_asking_anybody(fleet: Path) -> None:
    """What the last look at the template fetched."""
    assert repository("template")["template"].text == f"gguf-fleet {__version__}"
    tag = "refs/fleet/template/tags/v99.1.0"
    subprocess.run([*_GIT, "update-ref", tag, "HEAD"], cwd=fleet, check=True)
    try:
        line = repository("template")["template"]
        assert (line.state, line.fix) == ("warn", "fleet template update --dry-run")
        assert line.text.endswith("; 99.1.0 is there")
    finally:
        subprocess.run([*_GIT, "update-ref", "-d", tag], cwd=fleet, check=True)


# --- the machine ------------------------------------------------------------------------------


def _hosts(root: Path, *lines: str) -> None:
    """Declare other hosts."""
    text = (root / "params.yaml").read_text()
    begin = text.index("\nhosts:\n") + len("\nhosts:\n")
    end = text.index("\n\n", begin)
    body = "\n".join(f"  {line}" for line in lines)
    (root / "params.yaml").write_text(text[:begin] + body + text[end:])


def _plug(monkeypatch: pytest.MonkeyPatch, *, driver: str = "580.65.06", cuda: int = 13000) -> Any:
    """Put an RTX 3090 behind NVML's names, as it was traced."""
    trace = json.loads((nvml_replay.TRACES / "healthy.json").read_text())
    replayed = nvml_replay.NvmlReplay(trace)
    replayed.nvmlSystemGetCudaDriverVersion = lambda: cuda  # type: ignore[attr-defined]
    replayed.nvmlSystemGetDriverVersion = lambda: driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", replayed)
    monkeypatch.setattr(gpu, "_may_have_driver", lambda: True)
    monkeypatch.setattr(health_probe, "_WATCH_S", 0.0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return replayed


def test_a_card_is_held_against_the_host_that_it_can_be(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several declared ones the largest that fits; too small for all of them is a failure."""
    _plug(monkeypatch)
    _hosts(fleet, "small: {vram_mib: 8192}", "desk: {vram_mib: 24000}", "rack: {vram_mib: 81920}")
    found = of_machine("card")
    assert (found["card"].state, found["driver"].state) == ("ok", "ok")
    assert found["card"].text == "NVIDIA GeForce RTX 3090, 24,576 MiB"
    _hosts(fleet, "rack: {vram_mib: 81920, runs_on: [self-hosted, gpu]}")
    line = of_machine("card")["card"]
    assert (line.state, line.exit_code) == ("fail", 7)
    assert line.text == "host rack: NVIDIA GeForce RTX 3090, 24,576 MiB (wanted: 81,920 MiB)"
    assert "correct hosts: of params.yaml" in line.fix


def test_no_driver_is_a_failure_where_the_card_is_and_a_warning_on_a_desk(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who only edits the declaration has no card, and is told that nothing is measured there."""
    monkeypatch.setattr(gpu, "_may_have_driver", lambda: False)
    monkeypatch.setattr(doctor_machine, "_has_nvidia", lambda: False)
    _hosts(fleet, "rack: {vram_mib: 24576, runs_on: [self-hosted, gpu]}")
    line = of_machine("card")["driver"]
    assert (line.state, line.fix) == ("warn", "On rack itself: fleet doctor")
    assert "nothing can be measured for host rack" in line.text
    for certain in (
        ("_has_nvidia", lambda: True),
        ("_name_here", lambda: "rack"),
        ("_is_self_hosted", lambda: True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(doctor_machine, *certain)
            patch.setattr(doctor_machine, "_runner", lambda _at: iter(()))
            line = of_machine("card")["driver"]
        assert (line.state, line.exit_code) == ("fail", 7)
        assert line.text.startswith("host rack: no driver answers")
        assert "nvidia-smi" in line.fix


def test_a_driver_too_old_to_compile_for_is_said_before_the_build(
    fleet: Path,  # noqa: ARG001 - the working directory
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The words of the build itself; a toolkit newer than the driver compiles, and never runs."""
    monkeypatch.setenv("GGUF_FLEET_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("pipelines.toolchain_build._system_nvcc", lambda: None)
    _plug(monkeypatch, driver="470.10", cuda=11040)
    line = of_machine("cuda")["cuda"]
    assert (line.state, line.exit_code) == ("fail", 7)
    assert "too old" in line.text
    assert "Install a driver" in line.fix
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr("pipelines.toolchain_build._system_nvcc", lambda: nvcc)
    line = of_machine("cuda")["cuda"]
    assert (line.state, "newer than driver 470.10" in line.text) == ("fail", True)
    assert "CUDACXX" in line.fix


def test_a_full_disk_is_said_with_what_is_missing(fleet: Path, tmp_path: Path) -> None:
    """A real file system of 8 MiB as work/, and everything declared still to be made."""
    with small_disk.small_disk(tmp_path / "small", 8 << 20) as place:
        (fleet / "work").symlink_to(place)
        found = {
            name: line
            for look in ("disk", "disk-fleet", "disk-speed", "dvc-link")
            for name, line in of_machine(look).items()
        }
        assert (found["disk-fleet"].state, found["disk-fleet"].exit_code) == ("fail", 7)
        assert "the disk is too small" in found["disk-fleet"].text
        assert "Make room" in found["disk-fleet"].fix
        assert (found["disk-work"].state, "GiB free" in found["disk-work"].text) == ("warn", True)
        assert found["disk-speed"].state == "warn"
        assert found["disk-speed"].text.startswith("not measured")
        # The cache lies elsewhere, so each artifact would be there twice.
        assert (found["dvc-link"].state, "one file system" in found["dvc-link"].fix) == (
            "warn",
            True,
        )
        assert not list(place.glob(".fleet-*"))
        (fleet / "work").unlink()


def test_a_place_that_cannot_be_written_is_said_and_the_rest_is_looked_at(fleet: Path) -> None:
    """A file where work/ should be; nothing ends half-way."""
    (fleet / "work").write_text("")
    for name in ("disk-speed", "reflink", "locks"):
        line = of_machine(name)[name]
        assert (line.state, "work: File exists" in line.text) == ("warn", True)


@pytest.mark.parametrize(("off_s", "state"), [(0, "ok"), (3600, "fail")])
def test_a_clock_is_held_against_githubs_unless_offline(
    fleet: Path,  # noqa: ARG001 - the working directory
    off_s: int,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An hour late, no token is good any more."""

    class Clock(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", email.utils.formatdate(time.time() + off_s, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Clock) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GITHUB_API_URL", f"http://127.0.0.1:{server.server_port}")
        line = of_machine("clock", offline=False)["clock"]
        server.shutdown()
    assert line.state == state
    assert ("timedatectl set-ntp true" in line.fix) == (state == "fail")
    assert "clock" not in doctor_machine.looks_that_wait(Layout(), None, offline=True)


def test_clocks_that_save_power_and_too_little_memory_are_said(
    fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one makes numbers of its own, the other no number at all."""
    monkeypatch.setattr(machine, "governor", lambda: "powersave")
    monkeypatch.setattr(machine, "usable_memory_bytes", lambda: 2 << 30)
    _hosts(fleet, "alone: {memory_mib: 4096}")
    saves = of_machine("governor")["governor"]
    assert (saves.state, saves.fix) == (
        "warn",
        "sudo cpupower frequency-set --governor performance",
    )
    little = of_machine("memory")["memory"]
    assert (little.state, little.exit_code) == ("fail", 7)
    assert little.text == "2,048 MiB usable; host alone is declared with 4,096 MiB"
    _hosts(fleet, "box: {memory_mib: 4096, runs_on: [self-hosted]}")
    assert of_machine("memory")["memory"].state == "warn"


# --- where nothing is set up ------------------------------------------------------------------


def test_without_packages_and_without_git_it_says_how_to_get_them(fleet: Path) -> None:
    """A Python of the system that sees no package of ours, and a PATH with nothing on it."""
    done = subprocess.run(
        # Isolated from the environment's packages: no `site`, only the checkout.
        [sys.executable, "-S", "-m", "pipelines", "doctor", "--json", "--offline"],
        cwd=fleet,
        env={"PATH": "/nowhere", "HOME": str(fleet), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    found = {(line["area"], line["name"]): line for line in json.loads(done.stdout)["lines"]}
    packages = found["machine", "packages"]
    assert (packages["state"], packages["fix"].splitlines()[0]) == ("fail", "make setup")
    assert "pydantic" in packages["text"] or "dvc" in packages["text"]
    assert found["machine", "git"]["state"] == "fail"
    assert "apt-get install git" in found["machine", "git"]["fix"]
    assert found["repository", "git"]["state"] == "warn"


def test_outside_of_a_fleet_it_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No traceback, and no folder of ours in a stranger's directory."""
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--offline"]) == 2
    assert "root of your fleet" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_look_that_breaks_is_a_warning_with_its_cause(
    fleet: Path,  # noqa: ARG001 - the working directory
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a broken driver raises, everything else is said."""

    def broken() -> tuple[gpu.Card, ...]:
        raise RuntimeError("::error::NVML says\nnonsense")

    monkeypatch.setattr(gpu, "cards", broken)
    monkeypatch.setattr(machine, "usable_memory_bytes", lambda: 1 / 0)
    found = _worst(
        doctor_machine.lines(Layout(), doctor_repository.declared(Layout())[0], offline=True)
    )
    assert found["card"].state == found["memory"].state == "warn"
    assert "RuntimeError" in found["card"].text
    # A line of the log that the Actions runner would obey is none any more.
    assert "::error::" not in found["card"].text
    assert found["locks"].state == "ok"


def test_a_server_that_hangs_holds_nobody_up() -> None:
    """Others that are asked at the same time are heard; it is named."""
    hangs = threading.Event()
    looks: dict[str, Callable[[], list[Line]]] = {
        "slow": lambda: [doctor_lines.ok("github", "slow", str(hangs.wait(60)))],
        "quick": lambda: [doctor_lines.ok("github", "quick", "there")],
    }
    slow, quick = doctor_lines.together("github", looks, within_s=0.2)
    hangs.set()
    assert (slow.name, slow.state, quick.state) == ("slow", "warn", "ok")
    assert "no answer within" in slow.text


def test_the_first_failure_decides_the_exit_code() -> None:
    """Warnings only with --strict; the areas in the order in which they are put right."""
    lines = [
        doctor_lines.warn("machine", "a", "a", "b"),
        doctor_lines.fail("repository", "b", "b", "c", code=6),
        doctor_lines.fail("github", "c", "c", "d"),
    ]
    assert doctor_lines.exit_code(lines, strict=False) == 6
    assert doctor_lines.exit_code(lines[:1], strict=False) == 0
    assert doctor_lines.exit_code(lines[:1], strict=True) == 5
    assert doctor_lines.page(lines).index("machine") < doctor_lines.page(lines).index("github")


@pytest.mark.parametrize(
    ("url", "slug"),
    [
        ("https://github.com/OWNER/fleet.git", "OWNER/fleet"),
        ("https://x-access-token:secret@github.com/OWNER/fleet", "OWNER/fleet"),
        ("git@github.com:OWNER/fleet.git", "OWNER/fleet"),
        ("ssh://git@github.com:22/OWNER/fl.eet.git", "OWNER/fl.eet"),
        ("https://example.invalid/OWNER/fleet.git", None),
        ("/srv/git/fleet.git", None),
    ],
)
def test_the_repository_on_github_is_that_of_origin(
    fleet: Path, url: str, slug: str | None
) -> None:
    """Whichever way it is spelled; another server is none that can be asked."""
    subprocess.run([*_GIT, "remote", "add", "origin", url], cwd=fleet, check=True)
    try:
        assert doctor_lines.github_repository(fleet) == slug
    finally:
        subprocess.run([*_GIT, "remote", "remove", "origin"], cwd=fleet, check=True)
