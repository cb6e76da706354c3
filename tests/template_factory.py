"""
A small template and forks of it: real repositories, real git, files of a few lines.

    template = Template.make(tmp_path / "template")        # has the tag v1.0.0
    fork = template.copied(tmp_path / "fork")               # as by "Use this template"
    fork = template.forked(tmp_path / "fork")               # as by the fork button
    template.release("1.1.0", {"docs/a.md": "..."})
    fork.update()
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import owners, template
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
LINES = "".join(f"line {count}\n" for count in range(1, 21))

# Of the operator, as the example has them.
EXAMPLE = {
    "params.yaml": "models: {example: {}}\n",
    "dvc.lock": "schema: '2.0'\n",
    "pipelines/dvc.lock": "schema: '2.0'\n",
    ".dvc/config": "[core]\n",
    ".github/CODEOWNERS": "* @OWNER\n",
    "corpora/evaluation.txt": LINES,
    "modelfiles/chat.Modelfile.j2": LINES,
    "results/example/choice.json": "{}\n",
}
TEMPLATES = {
    "dvc.yaml": "stages: {}\n",
    "pipelines/__init__.py": '"""A template."""\n\n__version__ = "1.0.0"\n',
    "pipelines/owners.py": (ROOT / "pipelines/owners.py").read_text(encoding="utf-8"),
    "docs/a.md": LINES,
    "docs/b.md": LINES.replace("line", "row"),
    "docs/old.md": "old\n",
    ".gitignore": "/work/\n/.dvc/tmp/\n__pycache__/\n",
}


@dataclass(frozen=True)
class Repository:
    """A repository with a work tree at `path`."""

    path: Path

    @classmethod
    def start(cls, path: Path, branch: str) -> Any:
        """Make an empty one."""
        # Without the hooks and words that git brings as examples.
        subprocess.run(["git", "init", "-q", "--template=", "-b", branch, str(path)], check=True)
        return cls(path).named()

    def named(self) -> Any:
        """Say who commits."""
        with (self.path / ".git/config").open("a", encoding="utf-8") as file:
            file.write("[user]\n\tname = Operator\n\temail = operator@example.invalid\n")
            file.write("[maintenance]\n\tauto = false\n")
        return self

    def git(self, *argv: str, ok: bool = True, **env: str) -> str:
        """Run git; return what it prints."""
        done = subprocess.run(
            ["git", *argv], cwd=self.path, check=False, capture_output=True, text=True,
            env={**os.environ, **env},
        )  # fmt: skip
        assert done.returncode == 0 or not ok, done.stdout + done.stderr
        return done.stdout.strip()

    def commit(self, files: Mapping[str, str | None], message: str = "change") -> None:
        """Write files, or remove those that are None, and commit all of it."""
        for name, text in files.items():
            place = self.path / name
            if text is None:
                place.unlink()
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    @property
    def head(self) -> str:
        """The commit that is checked out."""
        return self.git("rev-parse", "HEAD")

    @property
    def state(self) -> tuple[str, str, str]:
        """Commit, branch and everything that is not committed; equal if nothing has changed."""
        where = self.git("rev-parse", "HEAD", "--abbrev-ref", "HEAD").split()
        return where[0], where[-1], self.git("status", "-s")

    def tree(self, rev: str = "HEAD") -> str:
        """Name that git has for all files of a commit."""
        return self.git("rev-parse", f"{rev}^{{tree}}")

    def operators(self) -> dict[str, bytes]:
        """Return every tracked file of the operator, as it lies in the work tree."""
        names = self.git("ls-files").splitlines()
        mine = [name for name in names if owners.is_operators(name) or name.startswith("own/")]
        return {name: (self.path / name).read_bytes() for name in mine}

    def read(self, name: str) -> str:
        """Return a file of the work tree."""
        return (self.path / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Template(Repository):
    """The template's repository."""

    @classmethod
    def make(cls, path: Path) -> Template:
        """Make one with a history of two commits, the second tagged v1.0.0."""
        made: Template = cls.start(path, "main")
        made.commit({**EXAMPLE, **TEMPLATES, "docs/a.md": "draft\n"}, "Begin")
        made.commit({"docs/a.md": LINES}, "Go on")
        made.git("tag", "v1.0.0")
        return made

    def release(self, version: str, files: Mapping[str, str | None]) -> None:
        """Commit files as the next version, and tag it with words of its own."""
        text = TEMPLATES["pipelines/__init__.py"].replace("1.0.0", version)
        self.commit({**files, "pipelines/__init__.py": text}, f"Make {version}")
        self.git("tag", "-a", f"v{version}", "-m", f"Version {version}")

    def copied(self, path: Path) -> Fork:
        """Make a fork as "Use this template" does: the same files, a history of its own."""
        shutil.copytree(self.path, path, ignore=shutil.ignore_patterns(".git"))
        fork: Fork = Fork.start(path, "trunk")
        fork.commit({}, "Initial commit")
        return fork.configured()

    def forked(self, path: Path) -> Fork:
        """Make a fork as the button does: the same history, and a branch of another name."""
        clone = ["git", "clone", "-q", "--no-tags", "--template=", str(self.path), str(path)]
        subprocess.run(clone, check=True)
        fork: Fork = Fork(path).named()
        fork.git("branch", "-m", "trunk")
        return fork.configured()


@dataclass(frozen=True)
class Fork(Repository):
    """A fork of it."""

    def configured(self) -> Fork:
        """Say where the template is: in the folder beside."""
        self.git("remote", "add", "template", "../template")
        return self

    def work(self) -> None:
        """Do what operators do: a fleet of their own, files of their own, no example."""
        self.commit(
            {
                "params.yaml": "models: {mine: {}}\n",
                "dvc.lock": None,
                ".github/CODEOWNERS": "* @me\n",
                ".github/README.md": "ours\n",
                "corpora/ours.txt": LINES,
                "corpora/evaluation.txt": LINES + "ours\n",
                "results/example/choice.json": None,
                "results/mine/choice.json": "{}\n",
                "own/notes.md": "ours\n",
            },
            "Our fleet",
        )

    def verb(self, use: str, **options: Any) -> int:
        """Type `fleet template USE` in it."""
        args = {
            "to": None, "origin": None, "base": None, "dry_run": False, "leave_conflicts": False,
            "json": False, **options,
        }  # fmt: skip
        return template.main(Layout(self.path), argparse.Namespace(use=use, **args))

    def update(self, **options: Any) -> int:
        """Type `fleet template update` in it."""
        return self.verb("update", **options)
