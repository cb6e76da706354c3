"""A fork takes the template's next version with the operator's files as they were, or nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import sample
from docs_commands import blocks
from template_factory import LINES, ROOT, TEMPLATES, Fork, Repository, Template

from pipelines import __version__, template, template_releases, template_update
from pipelines.errors import (
    FleetError,
    GateError,
    MachineError,
    ParamsError,
    RetryLaterError,
    UpstreamError,
)
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS = ("copied", "forked")
NEXT: dict[str, str | None] = {
    "docs/a.md": LINES.replace("line 3\n", "line three\n"),
    "docs/new.md": "new\n",
    "docs/old.md": None,
    "params.yaml": "models: {another: {}}\n",
    "corpora/evaluation.txt": "another\n",
    "results/example/choice.json": '{"another": 1}\n',
}
MINE: dict[str, str | None] = {"docs/a.md": LINES.replace("line 18\n", "line of ours\n")}


@pytest.fixture(autouse=True)
def no_look_again(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no verb of the new version in small forks, which have none."""
    if "whole" not in request.fixturenames:
        monkeypatch.setattr(template, "_child", lambda *_: None)


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the template at 1.0.0 and a fork of each kind, to be copied by every test."""
    folder = tmp_path_factory.mktemp("seed")
    template_ = Template.make(folder / "template")
    for kind in KINDS:
        getattr(template_, kind)(folder / kind).work()
    return folder


@pytest.fixture
def origin(seed: Path, tmp_path: Path) -> Template:
    """Return the template at 1.0.0."""
    shutil.copytree(seed / "template", tmp_path / "template")
    for kind in KINDS:
        shutil.copytree(seed / kind, tmp_path / ".seed" / kind)
    return Template(tmp_path / "template")


def fork_of(origin: Template, kind: str, name: str = "fork") -> Fork:
    """Return a fork of 1.0.0 with a fleet of its own: kind `copied` or `forked`."""
    fork = Fork(origin.path.parent / name)
    shutil.copytree(origin.path.parent / ".seed" / kind, fork.path)
    return fork


def plain_git(fork: Fork, *versions: str) -> None:
    """Do by git alone what docs/template.md says, from the version that it began with."""
    fork.git("fetch", "-q", "template", "refs/tags/template/*:refs/tags/template/*")
    began, *rest = versions
    fork.git("merge", "-q", "-s", "ours", "--allow-unrelated-histories", "--no-edit", began)
    for version in rest:
        fork.git("merge", "-q", "--no-edit", version)


# --- the same tree, whichever way -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_update_and_plain_git_make_the_same_tree_and_touch_nothing_of_the_operator(
    origin: Template, kind: str
) -> None:
    """Both sides changed; a second version; then each goes on by the way of the other."""
    by_verb, by_git = fork_of(origin, kind), fork_of(origin, kind, "by-git")
    for fork in (by_verb, by_git):
        fork.commit(MINE)
    before = by_verb.operators()
    assert len(before) == 10
    origin.release("1.1.0", NEXT)
    assert by_verb.update() == 0
    origin.release("1.2.0", {"docs/a.md": LINES.replace("line 3\n", "3\n"), "docs/new.md": None})
    assert by_verb.update() == 0
    assert Fork(origin.path).verb("tree") == 0  # by whoever publishes the template
    plain_git(by_git, "template/v1.0.0", "template/v1.1.0", "template/v1.2.0")
    assert by_verb.tree() == by_git.tree()
    assert by_verb.operators() == by_git.operators() == before
    text = by_verb.read("docs/a.md")
    assert "\n3\n" in text
    assert "line of ours" in text
    assert by_verb.git("status", "--short") == ""
    if kind == "forked":
        return
    # From now on, either way goes on from the other.
    origin.release("1.3.0", {"docs/b.md": "row\n"})
    assert by_git.update() == 0
    Fork(origin.path).verb("tree")
    by_verb.git("fetch", "-q", "template", "refs/tags/template/*:refs/tags/template/*")
    by_verb.git("merge", "-q", "--no-edit", "template/v1.3.0")
    assert by_verb.tree() == by_git.tree()
    assert by_verb.update() == by_git.update() == 0


def test_it_is_the_same_whether_the_fork_or_the_template_changes_first(origin: Template) -> None:
    """The order of two changes that do not meet says nothing about the result."""
    first, last = (fork_of(origin, "copied", name) for name in ("first", "last"))
    first.commit(MINE)
    origin.release("1.1.0", NEXT)
    assert first.update() == last.update() == 0
    text = last.read("docs/a.md").replace("line 18\n", "line of ours\n")
    last.commit({"docs/a.md": text})
    assert first.tree() == last.tree()


def test_an_update_that_was_squashed_is_no_conflict_later(origin: Template) -> None:
    """A squash leaves the files of a version and no merge; the same lines change once more."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    fork.git("switch", "-q", "-c", "update")
    fork.update()
    fork.git("switch", "-q", "trunk")
    fork.git("merge", "-q", "--squash", "update")
    fork.git("commit", "-q", "-m", "Update, squashed")
    fork.git("branch", "-D", "update")
    origin.release("1.2.0", {"docs/a.md": LINES.replace("line 3\n", "line three, again\n")})
    assert fork.update() == 0
    assert "line three, again" in fork.read("docs/a.md")


def test_an_update_that_was_taken_back_can_be_taken_again(origin: Template) -> None:
    """Git alone would take a merge that is in the history for done."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    fork.update()
    updated = fork.tree()
    fork.git("revert", "-m", "1", "--no-edit", "HEAD")
    assert not (fork.path / "docs/new.md").exists()
    assert fork.update() == 0
    assert fork.tree() == updated


def test_a_fork_made_between_two_releases_starts_from_exactly_there(origin: Template) -> None:
    """GitHub copies the newest commit of the template, which need not be a release."""
    origin.commit({"docs/a.md": LINES.replace("line 3\n", "line 3, unreleased\n")})
    forks: list[Fork] = [getattr(origin, kind)(origin.path.parent / kind) for kind in KINDS]
    origin.release("1.1.0", NEXT)
    for fork in forks:
        assert fork.update() == 0
        assert "line three\n" in fork.read("docs/a.md")


# --- conflicts --------------------------------------------------------------------------------

LOSES: dict[str, str | None] = {
    "docs/a.md": LINES.replace("line 3\n", "line 3 of ours\n"),
    "docs/old.md": "old, and ours\n",
}


def test_a_conflict_is_said_with_its_files_and_nothing_is_changed(
    origin: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file changed on both sides, and one changed here and removed there."""
    fork = fork_of(origin, "copied")
    fork.commit(LOSES)
    origin.release("1.1.0", NEXT)
    before = fork.state
    with pytest.raises(GateError) as raised:
        fork.update()
    assert "docs/a.md  (contents)" in raised.value.message
    assert "docs/old.md  (modify/delete)" in raised.value.message
    assert fork.update(dry_run=True, json=True) == GateError.exit_code
    told = capsys.readouterr().out
    conflicts = json.loads(told[told.index("\n{\n") :])["conflicts"]
    assert [each["path"] for each in conflicts] == ["docs/a.md", "docs/old.md"]
    assert fork.state == before


def test_conflicts_that_are_left_cannot_be_committed_unresolved_and_are_a_merge_then(
    origin: Template,
) -> None:
    """As git merge leaves them: abort brings all back, and a commit of it has both parents."""
    fork = fork_of(origin, "copied")
    fork.commit(LOSES)
    origin.release("1.1.0", NEXT)
    before, mine = fork.state, fork.operators()
    assert fork.update(leave_conflicts=True) == GateError.exit_code
    assert "<<<<<<< this fork\nline 3 of ours\n" in fork.read("docs/a.md")
    assert ">>>>>>> template 1.1.0\n" in fork.read("docs/a.md")
    assert "UU docs/a.md" in fork.git("status", "--short")
    fork.git("commit", "-q", "-m", "no", ok=False)
    assert fork.head == before[0]
    with pytest.raises(ParamsError, match="in the middle"):
        fork.update()
    fork.git("merge", "--abort")
    assert fork.state == before
    fork.update(leave_conflicts=True)
    (fork.path / "docs/a.md").write_text(LINES, encoding="utf-8")
    fork.git("add", "docs/a.md")
    fork.git("rm", "-q", "docs/old.md")
    fork.git("commit", "-q", "--no-edit")
    assert fork.git("rev-list", "--parents", "-1", "HEAD").split()[1:2] == [before[0]]
    assert fork.operators() == mine
    assert fork.update() == 0
    assert fork.read("docs/new.md") == "new\n"


def test_no_rename_that_git_guesses_reaches_a_file_of_the_operator(origin: Template) -> None:
    """A file that was moved into an operator's folder is the operator's."""
    fork = fork_of(origin, "copied")
    # git takes this for a rename, and would write the template's change into it.
    fork.commit({"docs/b.md": None, "modelfiles/b.md": TEMPLATES["docs/b.md"]})
    origin.release("1.1.0", {"docs/b.md": LINES.replace("line", "row") + "more\n"})
    with pytest.raises(GateError, match=r"docs/b\.md  \(modify/delete\)"):
        fork.update()
    assert fork.read("modelfiles/b.md") == TEMPLATES["docs/b.md"]


def test_a_path_that_becomes_the_operators_stays_as_it_is(origin: Template) -> None:
    """The table of owners of either side counts."""
    fork = fork_of(origin, "copied")
    fork.commit({"docs/b.md": "ours\n"})
    table = TEMPLATES["pipelines/owners.py"].replace('"corpora/",', '"corpora/",\n    "docs/b.md",')
    origin.release("1.1.0", {"pipelines/owners.py": table, "docs/b.md": "the example's\n"})
    assert fork.update() == 0
    assert fork.read("docs/b.md") == "ours\n"


# --- refusals ---------------------------------------------------------------------------------


def _detach(fork: Fork) -> None:
    fork.git("switch", "-q", "--detach")


def _edit(fork: Fork) -> None:
    (fork.path / "docs/a.md").write_text("edited\n", encoding="utf-8")


def _stage(fork: Fork) -> None:
    _edit(fork)
    fork.git("add", "docs/a.md")


def _in_the_way(fork: Fork) -> None:
    (fork.path / "docs/new.md").write_text("not in git\n", encoding="utf-8")


def _assume(fork: Fork) -> None:
    fork.git("update-index", "--assume-unchanged", "docs/a.md")
    _edit(fork)


def _skip(fork: Fork) -> None:
    fork.git("update-index", "--skip-worktree", "docs/a.md")
    _edit(fork)


def _pick(fork: Fork) -> None:
    fork.git("update-ref", "CHERRY_PICK_HEAD", "HEAD")


def _untold(fork: Fork) -> None:
    fork.commit({"pipelines/__init__.py": "\n"})


def _other_version(fork: Fork) -> None:
    text = TEMPLATES["pipelines/__init__.py"]
    fork.commit({"pipelines/__init__.py": text.replace("1.0.0", "1.0.1")})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (_detach, "no branch is checked out"),
        (_edit, r"not what the commit says: docs/a\.md"),
        (_stage, r"not what the commit says: docs/a\.md"),
        (_in_the_way, r"in the way of new ones: docs/new\.md"),
        (_assume, r"told not to look at files that change.*docs/a\.md"),
        (_skip, r"told not to look at files that change.*docs/a\.md"),
        (_pick, "in the middle of something"),
        (_untold, r"nobody can tell .*names no version"),
        (_other_version, r"nobody can tell .*no release 1\.0\.1"),
    ],
)
def test_what_cannot_be_merged_safely_is_refused_and_left(
    origin: Template, damage: Callable[[Fork], None], text: str
) -> None:
    """Each with the next step, and with the checkout as it was."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    damage(fork)
    before = fork.state
    with pytest.raises(ParamsError, match=text) as raised:
        fork.update()
    assert raised.value.hint
    assert fork.state == before


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("user.useConfigOnly", "true", "git config user.name"),
        ("commit.gpgSign", "true", "commit.gpgSign is true"),
    ],
)
def test_a_git_that_does_not_commit_changes_nothing(
    origin: Template, monkeypatch: pytest.MonkeyPatch, key: str, value: str, hint: str
) -> None:
    """Nobody is named, or a commit cannot be signed as all others are."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    fork.git("config", key, value)
    fork.git("config", "gpg.program", "false")
    if key.startswith("user."):
        fork.git("config", "--unset", "user.email")
    before = fork.state
    with pytest.raises(MachineError, match="git does not commit") as raised:
        fork.update()
    assert hint in raised.value.hint
    assert fork.state == before


def test_a_git_that_cannot_foretell_conflicts_is_told_of_the_way_without(
    origin: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distributions have git of 2022 still."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    _shim(tmp_path / "bin", "version)", "echo git version 2.34.1; exit 0;; merge-tree*) exit 129")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(MachineError, match=r"git version 2\.34\.1 cannot .* 2\.38 can") as raised:
        fork.update()
    assert "docs/template.md" in raised.value.hint


def test_a_version_that_the_files_are_not_of_is_asked_for(origin: Template) -> None:
    """A base that is too new would lose changes without a word."""
    origin.release("1.1.0", {f"docs/{name}.md": "new\n" for name in "cdefg"})
    fork = origin.copied(origin.path.parent / "fork")
    text = fork.read("pipelines/__init__.py").replace("1.1.0", "1.0.0")
    fork.commit({"pipelines/__init__.py": text})
    origin.release("1.2.0", NEXT)
    with pytest.raises(ParamsError, match=r"says 1\.0\.0, of which 5 files .* of 1\.1\.0 only 1"):
        fork.update()
    # What it says of its version is a change of its own then.
    assert fork.update(base="1.1.0", dry_run=True) == GateError.exit_code


def test_a_shallow_clone_and_a_folder_of_a_larger_repository_are_told_what_to_do(
    origin: Template, tmp_path: Path
) -> None:
    """Neither can tell what it has of the template."""
    url = f"file://{origin.path}"
    subprocess.run(["git", "clone", "-q", "--depth=1", url, str(tmp_path / "thin")], check=True)
    with pytest.raises(ParamsError) as raised:
        Fork(tmp_path / "thin").update(origin=url)
    assert "git fetch --unshallow" in raised.value.hint
    large: Repository = Repository.start(tmp_path / "large", "main")
    large.commit({"fleet/params.yaml": "", "fleet/dvc.yaml": ""})
    with pytest.raises(ParamsError, match="a folder of a larger repository"):
        Fork(tmp_path / "large/fleet").update(origin=url)


def test_a_template_that_is_not_there_is_an_error_with_the_line_to_type(
    origin: Template, tmp_path: Path
) -> None:
    """No remote, a wrong one, an option in its place, no such release, none at all."""
    fork = fork_of(origin, "copied")
    fork.git("remote", "set-url", "template", str(tmp_path / "nowhere"))
    with pytest.raises(UpstreamError, match="cannot be read from template"):
        fork.verb("status")
    fork.git("remote", "remove", "template")
    with pytest.raises(ParamsError) as raised:
        fork.verb("status")
    assert raised.value.hint.startswith("git remote add template ")
    with pytest.raises(UpstreamError):
        fork.verb("status", origin="--upload-pack=touch x")
    with pytest.raises(UpstreamError) as refused:
        fork.verb("status", origin="http://user:secret@127.0.0.1:9/template")
    assert "secret" not in refused.value.message
    with pytest.raises(ParamsError, match=r'no release "9\.0\.0"'):
        fork.verb("status", origin=str(origin.path), to="9.0.0")
    empty: Repository = Repository.start(tmp_path / "empty", "main")
    empty.commit({"a": "a"})
    with pytest.raises(ParamsError, match="has no release") as raised:
        fork.verb("status", origin=str(empty.path))
    assert raised.value.hint == f"git ls-remote --tags {empty.path}"


# --- tags -------------------------------------------------------------------------------------


def test_tags_that_are_no_release_are_passed_over_and_the_forks_own_stay(
    origin: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that a shell would run, pre-releases, a tag of a tree; a tag of the fork's own."""
    fork = fork_of(origin, "copied")
    own = fork.head
    fork.git("tag", "v1.1.0")
    origin.release("1.1.0", NEXT)
    for name in ("v1.2.0;id", "v$(id)", "v1.2.0-rc1", "v01.2.0", "v9", "v--force", "v1.2.0/x"):
        origin.git("tag", name)
    origin.git("tag", "v9.9.9", origin.tree())  # of no commit
    assert fork.update(json=True) == 0
    assert json.loads(capsys.readouterr().out)["to"] == "1.1.0"
    assert fork.git("rev-parse", "v1.1.0") == own
    assert fork.git("tag").split() == ["v1.1.0"]


def test_history_that_was_rewritten_is_said_and_the_update_starts_from_what_was_taken(
    origin: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tag of the template was moved after a fork took it."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    fork.update()
    origin.git("tag", "-d", "v1.1.0")
    rewritten = {"docs/a.md": LINES.replace("line 3\n", "line three, better\n")}
    origin.release("1.1.0", rewritten)
    origin.release("1.2.0", {"docs/b.md": "row\n"})
    assert fork.update() == 0
    assert "the template's v1.1.0 is" in capsys.readouterr().err
    assert "line three, better" in fork.read("docs/a.md")


def test_commits_of_the_template_tree_are_the_same_wherever_they_are_made(
    origin: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids are equal in two repositories of different settings; author, times and words are kept."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    fork.git("config", "i18n.commitEncoding", "ISO-8859-1")
    told = []
    for repository in (Fork(origin.path), fork):
        assert repository.verb("tree", json=True) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["template"] == told[1]["template"]
    assert set(told[0]["made"]) - set(told[1]["made"]) == {"refs/heads/template"}
    assert list(told[0]["template"]) == ["v1.0.0", "v1.1.0"]
    commit = told[0]["template"]["v1.1.0"]
    for format_ in ("%an %ae %ai %cn %ce %ci", "%B"):
        one, other = (origin.git("show", "-s", f"--format={format_}", c) for c in (commit, "main"))
        assert one == other
    names = set(origin.git("ls-tree", "-r", "--name-only", commit).splitlines())
    assert names == {*TEMPLATES, "docs/new.md"} - {"docs/old.md"}
    assert fork.verb("tree", json=True) == 0
    assert json.loads(capsys.readouterr().out)["made"] == {}


def test_a_release_that_is_lower_than_a_published_one_is_refused(origin: Template) -> None:
    """It would give every later commit another id."""
    origin.release("1.1.0", NEXT)
    publisher = Fork(origin.path)
    publisher.verb("tree")
    before = origin.git("for-each-ref", "refs/tags", "refs/heads")
    origin.git("tag", "v1.0.1", "v1.0.0")
    with pytest.raises(ParamsError, match=r"refs/tags/template/v1\.1\.0 is .* make it"):
        publisher.verb("tree")
    origin.git("tag", "-d", "v1.0.1")
    assert origin.git("for-each-ref", "refs/tags", "refs/heads") == before


def test_a_table_of_owners_is_read_and_never_run(origin: Template, tmp_path: Path) -> None:
    """Code of a release does not run before somebody has merged it."""
    canary = tmp_path / "canary"
    evil = f"OPERATOR: tuple = (__import__('pathlib').Path({str(canary)!r}).touch(),)\n"
    origin.release("1.1.0", {"pipelines/owners.py": evil})
    fork = fork_of(origin, "forked")
    fork.verb("tree")
    assert not canary.exists()
    for number, text in enumerate(("(" * 5000, "{[]: 1}", "-" * 20_000 + "1", "\0")):
        release = {"pipelines/owners.py": f"OPERATOR: tuple = {text}\n"}
        origin.release(f"1.2.{number}", release)
    # The operator's paths are then those that this version knows.
    mine = fork.operators()
    assert fork.update() == 0
    assert fork.operators() == mine


# --- killed -----------------------------------------------------------------------------------

_KILL = "kill -9 $PPID; sleep 5"
# A torn write of the files: one that is new, one that is cut off, one that is not removed.
_TORN = "printf 'ne' > docs/new.md; printf 'line 1' > docs/a.md; kill -9 $PPID; sleep 5"


@pytest.mark.parametrize(
    ("pattern", "before"),
    [
        ("update-ref\\ -m*", _KILL),
        ("reset\\ --hard*", _TORN),
        ("reset\\ --hard*", ""),
        ("update-ref\\ -d*", ""),
    ],
)
def test_an_update_that_is_killed_leaves_the_old_or_the_new_and_either_way_goes_on(
    origin: Template, tmp_path: Path, pattern: str, before: str
) -> None:
    """By SIGKILL of the verb and of git; also while half of the files are written."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    old, mine = fork.tree(), fork.operators()
    _killed(fork, tmp_path / "bin", pattern, before)
    twin = Fork(tmp_path / "twin")
    shutil.copytree(fork.path, twin.path)
    # With git alone, as was printed beforehand.
    twin.git("reset", "--hard", "-q")
    assert twin.git("status", "--short") == ""
    assert twin.operators() == mine
    assert twin.tree() == old or twin.read("docs/new.md") == "new\n"
    # With the same command.
    assert fork.update() == 0
    assert fork.git("status", "--short") == ""
    assert fork.read("docs/new.md") == "new\n"
    assert not (fork.path / "docs/old.md").exists()
    assert fork.tree() == twin.tree() or twin.tree() == old
    assert fork.operators() == mine


def _killed(fork: Fork, folder: Path, pattern: str, before: str) -> None:
    """Update in a process that a git of ours kills, before or after one of its commands."""
    _shim(folder, f"{pattern})", before or f'{shutil.which("git")} "$@"; {_KILL}')
    code = (
        "import sys; from template_factory import Fork; from pathlib import Path; "
        "Fork(Path(sys.argv[1])).update()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(fork.path)], check=False, capture_output=True,
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}",
             "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def _shim(folder: Path, pattern: str, act: str) -> None:
    """Put a git into a folder that does something else for some commands."""
    folder.mkdir()
    path = folder / "git"
    git = shutil.which("git")
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{pattern} {act};;\nesac\nexec {git} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_commit_after_a_kill_is_not_taken_for_the_update(
    origin: Template, tmp_path: Path
) -> None:
    """It was killed before the branch moved; then somebody went on, and removed a file."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    _killed(fork, tmp_path / "bin", "update-ref\\ -m*", _KILL)
    fork.git("commit", "-q", "--allow-empty", "-m", "Go on")
    (fork.path / "docs/b.md").unlink()
    with pytest.raises(ParamsError, match=r"not what the commit says: docs/b\.md"):
        fork.update()
    assert not (fork.path / "docs/b.md").exists()


def test_a_file_that_was_edited_after_a_kill_is_not_overwritten(
    origin: Template, tmp_path: Path
) -> None:
    """What is neither old nor new is somebody's work."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    _killed(fork, tmp_path / "bin", "reset\\ --hard*", _TORN)
    (fork.path / "docs/a.md").write_text("written since\n", encoding="utf-8")
    with pytest.raises(MachineError, match=r"docs/a\.md is neither old nor new") as raised:
        fork.update()
    assert "git reset --hard" in raised.value.hint
    assert fork.read("docs/a.md") == "written since\n"


def test_a_branch_that_moved_meanwhile_is_not_moved_back(
    origin: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is set against what it was."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    real = template_update.message_of

    def meanwhile(update: template_update.Update) -> str:
        fork.git("commit", "-q", "--allow-empty", "-m", "Meanwhile")
        return real(update)

    monkeypatch.setattr(template_update, "message_of", meanwhile)
    with pytest.raises(FleetError, match="in this very moment"):
        fork.update()
    assert fork.git("show", "-s", "--format=%s") == "Meanwhile"
    assert fork.git("status", "--short") == ""
    assert fork.git("for-each-ref", "refs/fleet/template/moving") == ""


def test_another_branch_that_was_checked_out_meanwhile_does_not_get_the_update(
    origin: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever signs commits is asked for a passphrase, and works on in another window."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    real = template_update.message_of

    def meanwhile(update: template_update.Update) -> str:
        fork.git("switch", "-q", "-c", "another")
        return real(update)

    monkeypatch.setattr(template_update, "message_of", meanwhile)
    before = fork.git("rev-parse", "trunk")
    with pytest.raises(RetryLaterError, match="another branch was checked out"):
        fork.update()
    assert fork.git("rev-parse", "trunk", "another").split() == [before.strip()] * 2
    assert fork.git("status", "--short") == ""


def test_a_file_that_was_edited_while_the_commit_was_signed_is_not_overwritten(
    origin: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was looked at before is looked at again when all that is left is to write."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", NEXT)
    real = template_update.message_of

    def meanwhile(update: template_update.Update) -> str:
        _edit(fork)
        return real(update)

    monkeypatch.setattr(template_update, "message_of", meanwhile)
    before = fork.head
    with pytest.raises(ParamsError, match=r"not what the commit says: docs/a\.md"):
        fork.update()
    assert fork.read("docs/a.md") == "edited\n"
    assert fork.head == before


def test_a_link_is_not_replaced_by_a_folder_of_the_template(
    origin: Template, tmp_path: Path
) -> None:
    """Git would do so without a word."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", {"bench/new/a.md": "new\n"})
    (fork.path / "bench").symlink_to(tmp_path)
    with pytest.raises(ParamsError, match=r"in the way of new ones: bench/new/a\.md"):
        fork.update()
    assert (fork.path / "bench").is_symlink()


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_folder_becomes_a_file_unless_something_else_lies_in_it(
    origin: Template,
    is_alone: bool,  # noqa: FBT001 - a column of the table
) -> None:
    """What git knows of it is in the commit before; what it does not know is nowhere else."""
    fork = fork_of(origin, "copied")
    origin.release("1.1.0", {"bench/deep/a.md": "new\n"})
    assert fork.update() == 0
    shutil.rmtree(origin.path / "bench")
    origin.release("1.2.0", {"bench": "a file\n"})
    if is_alone:
        assert fork.update() == 0
        assert fork.read("bench") == "a file\n"
        return
    (fork.path / "bench/deep/mine.md").write_text("mine\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="in the way of new ones: bench"):
        fork.update()
    assert fork.read("bench/deep/mine.md") == "mine\n"


# --- what is said -----------------------------------------------------------------------------

_CHANGELOG = """# Changelog

## [Unreleased]

### What you have to do

- not yet

## [1.2.0] - 2027-02-01

### What you have to do

- Build the toolchain again:
  `make toolchain`.
- Look at it.

### Added

- something

## [1.1.0] - 2027-01-01

### What you have to do

- Nothing.

## [1.0.0] - 2026-11-22
"""


def test_status_says_what_to_do_for_every_version_between(
    origin: Template, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only versions between, the oldest first; nothing of the checkout changes."""
    fork = fork_of(origin, "copied")
    fork.commit(MINE)
    origin.release("1.1.0", NEXT)
    origin.release("1.2.0", {"CHANGELOG.md": _CHANGELOG})
    before = fork.state
    assert fork.verb("status") == 0
    told = capsys.readouterr().out
    assert "1.1.0: Nothing.\n1.2.0: Build the toolchain again: `make toolchain`.\n" in told
    assert "that you have changed: docs/a.md" in told
    assert "not yet" not in told
    assert fork.state == before
    assert template.here(Layout(fork.path)) == ("1.0.0", "1.2.0")
    assert fork.update(dry_run=True, json=True) == 0
    assert json.loads(capsys.readouterr().out)["changed"][0] == "CHANGELOG.md"
    assert fork.state == before
    assert fork.update(to="v1.1.0") == 0
    assert fork.update(to="1.1.0") == 0
    with pytest.raises(ParamsError, match=r"1\.0\.0 is older"):
        fork.update(to="1.0.0")


def test_the_changelog_has_this_version_and_says_what_to_do() -> None:
    """And each version has points that status can show."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text)
    assert versions[0] == __version__
    found = template.changes(text, (0, 0, 0), template_releases.parse(versions[0]) or (0, 0, 0))
    assert [section.version for section in found] == versions[::-1]
    assert all(section.to_do for section in found)


def test_what_the_page_says_of_git_alone_is_the_same_tree_as_typed(origin: Template) -> None:
    """The block of docs/template.md is run as it stands; only the address leads to a folder."""
    (block,) = [
        each
        for each in blocks((ROOT / "docs/template.md").read_text(encoding="utf-8"))
        if any("merge -s ours" in line for line in each.lines)
    ]
    by_git, by_verb = fork_of(origin, "copied"), fork_of(origin, "copied", "by-verb")
    by_git.git("remote", "remove", "template")
    by_git.git("config", f"url.{origin.path}.insteadOf", "https://github.com/OWNER/gguf-fleet")
    before = by_git.operators()
    origin.release("1.1.0", NEXT)
    Fork(origin.path).verb("tree")
    done = subprocess.run(
        ["bash", "-e", "-c", "\n".join(block.lines)],
        cwd=by_git.path,
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    by_verb.update()
    assert by_git.tree() == by_verb.tree()
    assert by_git.operators() == before


# --- the whole template -----------------------------------------------------------------------


CODE = ("pipelines/", "examples/", "docs/", "dvc.yaml", ".dvc", ".git", "CHANGELOG.md")


@pytest.fixture
def whole(tmp_path: Path) -> Fork:
    """Make a fork of this very template, with the frozen fleet, and a next version of it."""
    origin: Template = Template.start(tmp_path / "template", "main")
    named = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True
    ).stdout.split(b"\0")
    for name in (os.fsdecode(each) for each in named if each):
        if (ROOT / name).is_file() and name.startswith(CODE):
            (origin.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, origin.path / name)
    sample.lay(origin.path)
    origin.commit({}, "Begin")
    origin.git("tag", f"v{__version__}")
    fork = Fork(tmp_path / "fork")
    shutil.copytree(origin.path, fork.path, ignore=shutil.ignore_patterns(".git"))
    Fork.start(fork.path, "trunk").configured()
    # What an earlier version called otherwise.
    params = fork.read("params.yaml").replace("objective: speed", "aim: speed  # ours")
    fork.commit({"params.yaml": params}, "Initial commit")
    later = "RENAMED = (*RENAMED, Renamed(('models', '*', 'aim'), 'objective', '99.0.0'))\n"
    origin.commit(
        {
            "pipelines/__init__.py": (origin.path / "pipelines/__init__.py")
            .read_text(encoding="utf-8")
            .replace(f'"{__version__}"', '"99.0.0"'),
            "pipelines/migrations.py": (origin.path / "pipelines/migrations.py")
            .read_text(encoding="utf-8") + later,
            "docs/comment.md": "# Shorter\n",
            "docs/verdict.md": None,
        }
    )  # fmt: skip
    origin.git("tag", "v99.0.0")
    return fork


def test_the_whole_template_is_updated_by_its_own_code_and_the_new_code_looks_at_the_fleet(
    whole: Fork,
) -> None:
    """Status, update, migrate and check, each a process of the code that lies in the fork then."""
    before = whole.operators()
    told = json.loads(_type(whole, "template status --json").stdout)
    assert (told["version"], told["to"], told["conflicts"]) == (__version__, "99.0.0", [])
    done = _type(whole, "template update")
    # Said by the new version alone, as the one before knows of no such key.
    assert 'is called "objective" since 99.0.0: fleet template migrate' in done.stderr
    assert "+    objective: speed  # ours" in done.stderr
    assert whole.operators() == before
    assert not (whole.path / "docs/verdict.md").exists()
    assert whole.git("status", "--short") == ""
    _type(whole, "template migrate")
    assert whole.git("diff", "--stat").endswith("1 insertion(+), 1 deletion(-)")
    assert "all well" in _type(whole, "check").stdout


def _type(fork: Fork, words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *words.split()],
        cwd=fork.path, check=False, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
