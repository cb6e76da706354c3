"""
Programs of others that look at workflows and actions; their answers as findings of one form.

Each looks at the files of one checkout, offline. What a machine lacks is a `MissingError`.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from checks import installed, node
from checks.files import Finding
from pipelines import proc

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from checks.files import Repository, Yaml

_WITHIN_S: Final = 120.0
# Files to the built-in schema of check-jsonschema that describes them.
_SCHEMAS: Final = {
    "vendor.github-workflows": (".github/workflows/*.y*ml",),
    "vendor.github-actions": ("actions/*/action.y*ml",),
    "vendor.dependabot": (".github/dependabot.yml",),
    "vendor.github-issue-forms": (".github/ISSUE_TEMPLATE/[!c]*.yml",),
    "vendor.github-issue-config": (".github/ISSUE_TEMPLATE/config.yml",),
}
_YAML: Final = (".github/*.y*ml", ".github/*/*.y*ml", "actions/*/action.y*ml")
# Where programs of the shell lie; each is known by its name or by its first line.
_SHELL: Final = (".ci/*", ".github/**/*", "actions/**/*", "deploy/**/*", "examples/**/*")
# Checks that are off unless they are named.
_STRICTER: Final = "quote-safe-variables,avoid-nullary-conditions"
_SHEBANG: Final = re.compile(rb"#!.*\b(ba)?sh\b")
# What GitHub's service does not know yet, as it says it; a test tells when one is to go.
NEWER_THAN_THE_SERVICE: Final = {"cache-mode": "Unexpected value 'cache-mode'"}


def actionlint(repository: Repository) -> Iterator[Finding]:
    """Types of expressions, events, cron, calls of local actions."""
    workflows = sorted(w.path for w in repository.workflows.values())
    if not workflows:
        return
    program = installed.go_program(*installed.ACTIONLINT)
    config = repository.root / ".github/actionlint.yaml"
    # The shell is asked below, with more checks, also in actions.
    argv = [program, "-config-file", config, "-shellcheck", "", "-pyflakes", "",
            "-format", "{{json .}}", *workflows]  # fmt: skip
    for found in _json(_run(argv, repository.root, ok_codes=(0, 1))) or []:
        yield Finding(found["filepath"], found["line"], "actionlint", found["message"],
                      column=found["column"])  # fmt: skip


def zizmor(repository: Repository) -> Iterator[Finding]:
    """Ways in for an attacker: injection, dangerous triggers, loose pins, undocumented rights."""
    if not repository.workflows and not repository.actions:
        return
    argv = [_installed("zizmor"), "--offline", "--no-online-audits", "--no-progress",
            "--strict-collection", "--persona", "auditor", "--format", "json", "."]  # fmt: skip
    for found in _json(_run(argv, repository.root, ok_codes=(0, 11, 12, 13, 14))):
        places = found["locations"]
        chief = next((p for p in places if p["symbolic"]["kind"] == "Primary"), places[0])
        path = chief["symbolic"]["key"]["Local"]["verbatim_path"].removeprefix("./")
        line = chief["concrete"]["location"]["start_point"]["row"] + 1
        text = f"{found['desc']}: {chief['symbolic']['annotation']} ({found['ident']})."
        yield Finding(path, line, "zizmor", text, f"Read {found['url']}")


def schemas(repository: Repository) -> Iterator[Finding]:
    """Keys and values that GitHub's formats know."""
    for schema, globs in _SCHEMAS.items():
        paths = _paths(repository, globs)
        if not paths:
            continue
        argv = [_installed("check-jsonschema"), "--builtin-schema", schema, "-o", "json", *paths]
        answer = _json(_run(argv, repository.root, ok_codes=(0, 1)))
        for error in [*answer.get("errors", ()), *answer.get("parse_errors", ())]:
            best = error.get("best_deep_match") or error
            path = best.get("path", "$")
            name = error["filename"]
            text = f"{path}: {best.get('message', 'is no YAML')}."
            yield Finding(name, _line_of(repository, name, path), "schema", text,
                          f"{schema} says what may stand there.")  # fmt: skip


def yamllint(repository: Repository) -> Iterator[Finding]:
    """YAML that is read otherwise than it looks."""
    paths = _paths(repository, _YAML)
    config = repository.root / ".github/yamllint.yaml"
    argv = [_installed("yamllint"), "--strict", "--format", "parsable", "-c", config, *paths]
    done = _run(argv, repository.root, ok_codes=(0, 1, 2))
    for line in done.splitlines():
        if match := re.fullmatch(r"(.+?):(\d+):\d+: \[\w+\] (.+)", line):
            yield Finding(match[1], int(match[2]), "yamllint", match[3])


def shellcheck(repository: Repository) -> Iterator[Finding]:
    """Words of the shell that split, expand or fail otherwise than meant."""
    scripts = [name for name in _paths(repository, _SHELL) if _is_shell(repository.root / name)]
    with tempfile.TemporaryDirectory() as scratch:
        places: dict[str, tuple[str, int]] = {}
        for number, (_, step) in enumerate(repository.steps()):
            if not step.run:
                continue
            block = Path(scratch) / f"{number}.bash"
            text = re.sub(r"\$\{\{.*?\}\}", "value", step.run, flags=re.DOTALL)
            block.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            places[str(block)] = (step.file.path, step.file.line(*step.loc, "run"))
        if not scripts and not places:
            return
        argv = [_installed("shellcheck"), "--norc", "--enable", _STRICTER, "--external-sources",
                "--format", "json1", *scripts, *places]  # fmt: skip
        answer = _json(_run(argv, repository.root, ok_codes=(0, 1)))
    for found in answer["comments"]:
        file, line = places.get(found["file"], (found["file"], found["line"]))
        code = f"SC{found['code']}"
        yield Finding(file, line, "shellcheck", f"{found['message']} ({code})",
                      f"shellcheck's page of {code} says how to write it.")  # fmt: skip


def language_service(repository: Repository) -> Iterator[Finding]:
    """What GitHub's own editor service says: unknown inputs, contexts, properties, arities."""
    workflows = {w.path: repository.text(w.path) for w in repository.workflows.values()}
    actions = {a.path: repository.text(a.path) for a in repository.actions.values()}
    if not workflows and not actions:
        return
    # Of local actions it looks up only those that are spelled `$/`, which is as long as `./`.
    files = {path: re.sub(r"(\buses:\s+['\"]?)\./actions/", r"\1$/actions/", text)
             for path, text in {**workflows, **actions}.items()}  # fmt: skip
    question = {"files": files, "local": actions, "actions": _metadata(repository.pins)}
    for found in node.ask("validate.mjs", question):
        if not any(known in found["message"] for known in NEWER_THAN_THE_SERVICE.values()):
            yield Finding(found["file"], found["line"], "language-service", found["message"],
                          column=found["column"])  # fmt: skip


ALL: Final = {
    "actionlint": actionlint,
    "zizmor": zizmor,
    "schema": schemas,
    "yamllint": yamllint,
    "shellcheck": shellcheck,
    "language-service": language_service,
}


def _metadata(pins: Yaml | None) -> dict[str, Any]:
    """Return what the service would fetch from GitHub: names of inputs and outputs."""
    return {
        f"{name}@{pin['sha']}": {
            "name": name,
            "description": pin["why"],
            "inputs": {
                key: {"description": key, "required": key in pin["required"]}
                for key in pin["inputs"]
            },
            "outputs": {key: {"description": key} for key in pin["outputs"]},
        }
        for name, pin in (pins.data if pins else {}).items()
    }


def _paths(repository: Repository, globs: Sequence[str]) -> list[str]:
    root = repository.root
    found = {path for glob in globs for path in root.glob(glob) if path.is_file()}
    return sorted(path.relative_to(root).as_posix() for path in found)


def _is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix in {".sh", ".bash"} or bool(_SHEBANG.match(file.readline(200)))


def _line_of(repository: Repository, name: str, path: str) -> int:
    """Line of a JSON path such as `$.jobs.plan.steps[0]` in a file that was read."""
    files = [*repository.workflows.values(), *repository.actions.values()]
    file = next((each for each in files if each.path == name), None)
    parts = re.findall(r"[^.\[\]$']+", path)
    return file.line(*(int(p) if p.isdigit() else p for p in parts)) if file else 1


def _installed(name: str) -> Path:
    """Where a program of requirements.lock lies: beside the Python that runs this."""
    return Path(sys.executable).parent / name


def _run(argv: Sequence[object], root: Path, *, ok_codes: Sequence[int]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        done = proc.run(
            [str(word) for word in argv], log=log, cwd=root, ok_codes=ok_codes, timeout_s=_WITHIN_S
        )
    return done.stdout


def _json(text: str) -> Any:  # noqa: ANN401 - what a program answers
    return json.loads(text)
