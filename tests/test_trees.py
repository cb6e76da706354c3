"""Reading an operator's files from git: git's own bytes, nothing else, nowhere else."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from pipelines import trees
from pipelines.errors import FleetError, MachineError, ParamsError

if TYPE_CHECKING:
    from pathlib import Path

RECORD = b'{"schema_version": 1,\n "name": "caf\xc3\xa9"}\r\n'


def git(root: Path, *argv: str, told: bytes = b"") -> str:
    """Run git as a person would, with none of this machine's settings."""
    env = os.environ | {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        "LC_ALL": "C",
    }
    who = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *who, *argv], cwd=root, env=env, check=True, capture_output=True, input=told
    ).stdout.decode()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one commit: a declaration, a lock, two records, and what is not read."""
    root = tmp_path / "repo"
    (root / "results/m/quantize").mkdir(parents=True)
    (root / "corpora").mkdir()
    git(root, "init", "-q", "-b", "main")
    (root / "params.yaml").write_text("toolchain: {}\n")
    (root / "dvc.lock").write_text("schema: '2.0'\n")
    (root / "results/m/fetch.json").write_bytes(RECORD)
    (root / "results/m/quantize/Q8_0.json").write_bytes(b"{}")
    (root / "corpora/a.txt").write_text("text")
    commit(root, "first")
    return root


def commit(root: Path, message: str) -> str:
    """Commit everything; return its name."""
    git(root, "add", "--all")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD").strip()


def names(root: Path) -> list[str]:
    """Return the files below a folder."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


OWN = ["dvc.lock", "params.yaml", "results/m/fetch.json", "results/m/quantize/Q8_0.json"]


def test_a_commit_is_read_as_it_was_whatever_lies_in_the_checkout_now(
    repo: Path, tmp_path: Path
) -> None:
    """An edited record in the checkout changes nothing of what the commit says."""
    (repo / "results/m/fetch.json").write_text("edited")
    at = trees.at_revision(repo, "HEAD", tmp_path / "tree")
    assert names(tmp_path / "tree") == OWN
    assert at.model_record("fetch", "m").read_bytes() == RECORD


def test_bytes_are_those_of_git_whatever_attributes_the_branch_brings(
    repo: Path, tmp_path: Path
) -> None:
    """An archive or a checkout would leave the record out, or write other line ends."""
    (repo / ".gitattributes").write_text(
        "results/m/fetch.json export-ignore text eol=crlf\n*.json ident filter=x export-subst\n"
    )
    (repo / "results/m/choice.json").write_text('{"a": "$Format:%H$ $Id$"}\n')
    head = commit(repo, "attributes")
    at = trees.at_revision(repo, head, tmp_path / "tree")
    stored = git(repo, "show", f"{head}:results/m/fetch.json").encode()
    assert at.model_record("fetch", "m").read_bytes() == stored
    assert at.model_record("choose", "m").read_text() == '{"a": "$Format:%H$ $Id$"}\n'


def test_the_working_tree_is_read_with_what_is_not_committed(repo: Path, tmp_path: Path) -> None:
    """What a person has not committed yet is part of the working tree."""
    (repo / "results/m/fetch.json").write_text("edited")
    (repo / "results/n").mkdir()
    (repo / "results/n/fetch.json").write_text("new")
    at = trees.at_working_tree(repo, tmp_path / "tree")
    assert names(tmp_path / "tree") == sorted([*OWN, "results/n/fetch.json"])
    assert at.model_record("fetch", "m").read_text() == "edited"


def test_texts_are_laid_over_a_tree_and_the_checkout_stays_as_it_is(
    repo: Path, tmp_path: Path
) -> None:
    """A bundle and the head's declaration over the base."""
    at = trees.at_revision(repo, "HEAD", tmp_path / "tree")
    same = trees.lay_over(at, {"results/m/on/gpu2/choice.json": "{}", "params.yaml": "a: é\n"})
    assert same == at
    assert at.params.read_text("utf-8") == "a: é\n"
    assert (at.root / "results/m/on/gpu2/choice.json").read_text() == "{}"
    assert (repo / "params.yaml").read_text() == "toolchain: {}\n"


@pytest.mark.parametrize(
    "path",
    [
        "../params.yaml",
        "results/../../x.json",
        "/etc/passwd",
        "results//m.json",
        "results/./m.json",
        "results",
        "pipelines/verdict.py",
        ".git/config",
        "results/m/a\nb.json",
        "results\\..\\x",
        "",
    ],
)
def test_a_path_that_is_no_operators_file_is_refused_and_nothing_is_written(
    repo: Path, tmp_path: Path, path: str
) -> None:
    """Wherever a stranger wants a text to go."""
    at = trees.at_revision(repo, "HEAD", tmp_path / "tree")
    with pytest.raises(FleetError, match="is no file of"):
        trees.lay_over(at, {"dvc.lock": "other", path: "x"})
    assert names(at.root) == OWN
    assert (at.root / "dvc.lock").read_text() == "schema: '2.0'\n"


def test_a_file_where_a_folder_is_is_refused_by_name(repo: Path, tmp_path: Path) -> None:
    """No traceback for a tree that contradicts itself."""
    at = trees.at_revision(repo, "HEAD", tmp_path / "tree")
    with pytest.raises(FleetError, match="a file in one place and a folder in another"):
        trees.lay_over(at, {"results/m/fetch.json/more.json": "{}"})


def test_text_that_no_file_can_hold_is_refused(repo: Path, tmp_path: Path) -> None:
    """JSON may spell half of a surrogate pair."""
    at = trees.at_revision(repo, "HEAD", tmp_path / "tree")
    with pytest.raises(FleetError, match="holds no text"):
        trees.lay_over(at, {"results/m/choice.json": "\ud800"})


def test_links_of_a_branch_are_not_followed(repo: Path, tmp_path: Path) -> None:
    """A link in a branch would read a file of the runner."""
    (tmp_path / "secret").write_text("secret")
    (repo / "results/m/choice.json").symlink_to(tmp_path / "secret")
    (repo / "results/out").symlink_to(tmp_path)
    head = commit(repo, "links")
    for at in (
        trees.at_revision(repo, head, tmp_path / "tree"),
        trees.at_working_tree(repo, tmp_path / "copy"),
    ):
        assert names(at.root) == OWN
        assert not any(path.is_symlink() for path in at.root.rglob("*"))


def test_a_name_that_only_a_forged_commit_can_have_writes_nothing_outside(
    repo: Path, tmp_path: Path
) -> None:
    """Git itself would not check these out, but it lists them."""
    blob = git(repo, "hash-object", "-w", "--stdin", told=b"{}").strip()
    inner = git(repo, "mktree", told=f"100644 blob {blob}\tevil.json\n".encode()).strip()
    for _ in range(3):
        inner = git(repo, "mktree", told=f"040000 tree {inner}\t..\n".encode()).strip()
    tree = git(repo, "mktree", told=f"040000 tree {inner}\tresults\n".encode()).strip()
    head = git(repo, "commit-tree", tree, "-m", "forged").strip()
    trees.at_revision(repo, head, tmp_path / "a/b/c/tree")
    assert not list(tmp_path.rglob("evil.json"))


def test_a_branch_of_giants_is_refused_before_it_is_read(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are known before the bytes are asked for."""
    monkeypatch.setattr(trees, "_LARGEST_FILE_BYTES", 1000)
    (repo / "results/m/choice.json").write_bytes(b" " * 1001)
    commit(repo, "giant")
    with pytest.raises(FleetError, match=r"choice\.json of [0-9a-f]{12} has 1,001 bytes"):
        trees.at_revision(repo, "HEAD", tmp_path / "tree")


@pytest.mark.parametrize("rev", ["nope", "0" * 40, "--output=/tmp/x", "a b", "HEAD:params.yaml"])
def test_a_commit_that_is_not_there_is_named(repo: Path, tmp_path: Path, rev: str) -> None:
    """Options and blobs are no commits either."""
    with pytest.raises(ParamsError, match="git knows no commit") as caught:
        trees.at_revision(repo, rev, tmp_path / "tree")
    assert "git log" in caught.value.hint
    assert not (tmp_path / "tree").exists()


def test_a_shallow_clone_says_which_depth_it_needs(repo: Path, tmp_path: Path) -> None:
    """What actions/checkout leaves by default."""
    first = git(repo, "rev-parse", "HEAD").strip()
    commit(repo, "second")
    git(tmp_path, "clone", "-q", "--depth=1", f"file://{repo}", "shallow")
    with pytest.raises(ParamsError) as caught:
        trees.at_revision(tmp_path / "shallow", first, tmp_path / "tree")
    assert "fetch-depth: 0" in caught.value.hint


def test_a_folder_that_is_no_repository_is_said_to_be_none(tmp_path: Path) -> None:
    """And not reported as a missing commit."""
    with pytest.raises(MachineError, match="no repository"):
        trees.at_revision(tmp_path, "HEAD", tmp_path / "tree")


def test_a_fleet_in_a_folder_of_a_larger_repository_is_read_from_its_root(
    repo: Path, tmp_path: Path
) -> None:
    """Paths are below the fleet's root, not the repository's."""
    larger = tmp_path / "larger"
    (larger / "fleet").mkdir(parents=True)
    for name in ("params.yaml", "dvc.lock"):
        (larger / "fleet" / name).write_bytes((repo / name).read_bytes())
    git(larger, "init", "-q", "-b", "main")
    commit(larger, "first")
    trees.at_revision(larger / "fleet", "HEAD", tmp_path / "tree")
    assert names(tmp_path / "tree") == ["dvc.lock", "params.yaml"]
    assert trees.Git(larger / "fleet").show("HEAD", "params.yaml") == b"toolchain: {}\n"


def test_the_fork_point_is_where_the_branch_left_the_default_one(repo: Path) -> None:
    """Also of a branch whose name a shell would run."""
    base = git(repo, "rev-parse", "HEAD").strip()
    git(repo, "switch", "-q", "-c", "bump/$(touch${IFS}x);`x`")
    head = commit(repo, "mine")
    git(repo, "switch", "-q", "main")
    theirs = commit(repo, "theirs")
    reader = trees.Git(repo)
    assert reader.fork_point(head) == base
    assert reader.fork_point(head, theirs) == base
    assert reader.fork_point(head, "no-such-branch") is None
    assert not (repo / "x").exists()
