"""Rules about what stands beside the workflows: who agrees to a change, what is kept up to date."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from checks.files import Finding
from checks.policy import rule
from pipelines import marked_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from checks.files import Repository

CODEOWNERS: Final = ".github/CODEOWNERS"
_PLACEHOLDER: Final = "@OWNER/"
DEPENDABOT: Final = ".github/dependabot.yml"
# Whoever changes one of these decides what runs on the operator's machines.
_OWNED: Final = ("/.github/", "/actions/", "/checks/", "/deploy/", "/pipelines/", "/dvc.yaml",
                 "/Makefile", "/pyproject.toml", "/requirements.lock", "/tests/node/")  # fmt: skip
# Ecosystem to the folders in which its files lie.
_WATCHED: Final = {
    "github-actions": frozenset({"/", "/actions/*"}),
    "pip": frozenset({"/"}),
    "npm": frozenset({"/tests/node"}),
}
_COOLDOWN_DAYS: Final = 7
_IGNORE: Final = re.compile(r"#\s*(zizmor|shellcheck|yamllint|actionlint)[\s:]+(ignore|disable)")


@rule("codeowners-cover")
def codeowners_cover(repository: Repository) -> Iterator[Finding]:
    """A change of what runs on the operator's machines needs the eyes of somebody who knows it."""
    lines = repository.text(CODEOWNERS).splitlines()
    said = [line.split("#")[0].split() for line in lines]
    for path in _OWNED:
        # The last line that fits decides; one without an owner takes them away.
        owners = [words[1:] for words in said if words and words[0] in {path, "*", "/**"}]
        if not owners or not owners[-1]:
            text = f"Nobody owns {path}."
            yield Finding(CODEOWNERS, 1, "codeowners-cover", text, f"Add a line `{path} @team`.")


def unowned(repository: Repository) -> str:
    """Return a warning if the owners are still those of the template: nobody; else nothing."""
    lines = repository.text(CODEOWNERS).splitlines()
    count = sum(_PLACEHOLDER in line for line in lines if not line.startswith("#"))
    if not count:
        return ""
    return (
        f"{CODEOWNERS} names {_PLACEHOLDER}... in {count} lines, which is nobody: a pull request "
        "that changes its own gate waits for no code owner. Write your team there."
    )


@rule("dependabot-cover")
def dependabot_cover(repository: Repository) -> Iterator[Finding]:
    """A pin that nobody moves keeps every hole; one that moves at once takes stolen releases."""
    path = repository.root / DEPENDABOT
    document = marked_yaml.read(path) if path.is_file() else None
    updates = document.data.get("updates", ()) if document else ()
    for ecosystem, folders in _WATCHED.items():
        mine = [update for update in updates if update.get("package-ecosystem") == ecosystem]
        watched = {f for u in mine for f in u.get("directories", [u.get("directory")])}
        for folder in sorted(folders - watched):
            text = f"Nothing watches {ecosystem} in {folder}."
            yield Finding(DEPENDABOT, 1, "dependabot-cover", text, "Add an update for it.")
        for update in mine:
            days = (update.get("cooldown") or {}).get("default-days", 0)
            if days < _COOLDOWN_DAYS:
                text = f"{ecosystem} takes what came out {days} days ago."
                fix = f"Write cooldown: {{default-days: {_COOLDOWN_DAYS}}}."
                yield Finding(DEPENDABOT, 1, "dependabot-cover", text, fix)


@rule("no-inline-ignore")
def no_inline_ignore(repository: Repository) -> Iterator[Finding]:
    """An exception beside the fault hides it from everybody who does not read that line."""
    for file in [*repository.workflows.values(), *repository.actions.values()]:
        for number, line in enumerate(repository.text(file.path).splitlines(), start=1):
            if match := _IGNORE.search(line):
                text = f"A comment switches off what {match[1]} says."
                fix = "Correct the cause, or make the exception with its reason in .github/."
                yield Finding(file.path, number, "no-inline-ignore", text, fix)
