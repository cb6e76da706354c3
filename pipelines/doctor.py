"""
`fleet doctor`: what is wrong with this machine, this repository and its settings, and the fix.

It runs where nothing is set up: without params.yaml or with a broken one, without the packages,
without git, on a Python of the system. It changes nothing but files of its own in work/, which are
gone at the end. Servers are asked at once, each for three seconds at most; `--offline` asks none.

    0   nothing fails; with --strict nothing is a warning either
    5   with --strict: something is a warning
    N   something fails: the code with which a run would end at the first such line
        (2 declaration, 6 digest, 7 machine, 8 store; see `pipelines.errors`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import console, doctor_lines, doctor_machine, doctor_repository
from pipelines.doctor_lines import Line, fail, looked, warn

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.params import Declaration


# Lines of the repository that say what runs, and who agrees to a change of it.
_SECURITY: Final = frozenset({"declaration", "pins", "owners", "workflows"})


def main(at: Layout, *, as_json: bool, security: bool, strict: bool, offline: bool) -> int:
    """
    Look, and say it on stdout.

    Args:
        at: The checkout, or any folder.
        as_json: As JSON: {schema_version, exit_code, ok, warn, fail, lines}.
        security: Only what decides what runs: the settings of GitHub, which level of
            docs/security.md they reach, and what is not well of workflows, pins and owners.
        strict: A warning is a failure with code 5.
        offline: Ask no server.

    Returns:
        The exit code.
    """
    found = look(at, security=security, offline=offline)
    code = doctor_lines.exit_code(found, strict=strict)
    if as_json:
        console.out(doctor_lines.as_json(found, code=code))
    else:
        console.out(doctor_lines.page(found))
    return code


def look(at: Layout, *, security: bool = False, offline: bool = False) -> list[Line]:
    """Return every line, in the order of `doctor_lines.AREAS`; see `main`."""
    bare = bool(doctor_machine.missing_packages())
    declared: Declaration | None = None
    repository: list[Line] = []
    if not bare:
        try:
            declared, repository = doctor_repository.declared(at)
        except Exception as error:  # noqa: BLE001 - never a traceback
            text = f"cannot be read: {type(error).__name__}: {error}"
            repository = [fail("repository", "declaration", text, "fleet check")]
    machine = [] if security and not bare else doctor_machine.lines(at, declared, offline=offline)
    repository += doctor_repository.lines(at, declared, bare=bare, offline=offline or security)
    github = [] if bare else looked("github", "github", lambda: _github(at, declared, offline))
    if not security:
        return [*machine, *repository, *github]
    found = [*repository, *github]
    levels = looked("security", "levels", lambda: _levels(at, found))
    return [
        *(line for line in machine if line.name == "packages"),
        *(line for line in repository if line.name in _SECURITY and line.state != "ok"),
        *github,
        *levels,
    ]


def _github(at: Layout, declared: Declaration | None, offline: bool) -> list[Line]:  # noqa: FBT001 - as it was typed
    """Ask GitHub about its settings, where somebody can."""
    if offline:
        return []
    repository = doctor_lines.github_repository(at.root)
    if repository is None:
        text = "the git remote `origin` is no repository of GitHub's: nothing was asked"
        return [
            warn("github", "github", text, "git remote add origin git@github.com:OWNER/NAME.git")
        ]
    if not doctor_lines.token():
        text = f"settings of {repository} were not asked for: no token in the environment"
        return [warn("github", "github", text, 'export GH_TOKEN="$(gh auth token)"')]
    from pipelines import doctor_github  # noqa: PLC0415 - requests, and only with a token

    return doctor_github.lines(at, declared)


def _levels(at: Layout, found: list[Line]) -> list[Line]:
    from pipelines import doctor_security  # noqa: PLC0415 - only with --security

    return doctor_security.lines(at, found)
