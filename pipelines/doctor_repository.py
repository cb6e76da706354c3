"""
What `fleet doctor` says of the repository: declaration, git, lock, records, workflows, owners.

A fork that has measured nothing yet is no fault: what is absent is a warning with the next command.
What a run, a check or a pull request would stop at is a failure, with the exit code of that stop.
"""

from __future__ import annotations

import configparser
import re
import shlex
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from pipelines import (
    __version__,
    console,
    doctor_code,
    doctor_lines,
    owners,
    proc,
    toolchain,
    wording,
)
from pipelines.doctor_lines import Line, fail, ok, warn
from pipelines.errors import DigestError, FleetError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.doctor_lines import Look
    from pipelines.layout import Layout
    from pipelines.params import Declaration

# Wall seconds for a question to git, which reads this disk.
_GIT_WITHIN_S: Final = 10.0
_EXAMPLE: Final = "path:examples/tiny-llama"
_PINS: Final = frozenset({"pin-listed", "pin-used"})
_OWNERS: Final = frozenset({"codeowners-cover"})
_LOGIN: Final = re.compile(r"(?<=://)[^/@]*@")
_MOST_PROBLEMS: Final = 3
_CONFLICTS: Final = frozenset({"DD", "AU", "UD", "UA", "DU", "AA", "UU"})


def declared(at: Layout) -> tuple[Declaration | None, list[Line]]:
    """
    Read params.yaml and what it names.

    Returns:
        The declaration, None if there is no good one, and what is to be said of it.
    """
    if not at.params.exists():
        text = "there is no params.yaml: no fleet is declared"
        if not (at.root / "dvc.yaml").exists():
            return None, [warn("repository", "declaration", text, "cd FLEET")]
        return None, [fail("repository", "declaration", text, _put_back(at))]
    from pipelines import declaration  # noqa: PLC0415 - pydantic

    try:
        found = declaration.check(at)
    except ParamsError as error:
        problems = [str(each) for each in error.problems] or [error.message]
        more = len(problems) - _MOST_PROBLEMS
        text = " | ".join(problems[:_MOST_PROBLEMS]) + (f" | {more} more" if more > 0 else "")
        return _loaded(at), [fail("repository", "declaration", text, "fleet check")]
    except FleetError as error:
        return None, [doctor_lines.of_error("repository", "declaration", error)]
    return found, list(_declaration(found))


def _put_back(at: Layout) -> str:
    """Return what brings params.yaml back; `fleet init` itself begins with the one that is here."""
    name = at.params.name
    try:
        # The one before it, if the last commit that is about it took it away.
        last = _ask(at, "rev-list", "--max-count=1", "HEAD", "--", name).strip()
        for commit in ("HEAD", f"{last}~1") if last else ():
            if _ask(at, "ls-tree", "--name-only", commit, "--", name).strip():
                short = commit.replace(last, last[:12])
                return f"git checkout {short} -- {name}    # puts back what git has"
    except FleetError:
        pass  # no git, no commit, or a history that ends there
    sample = "tests/sample/params.yaml"
    if (at.root / sample).is_file():
        return f"cp {sample} {name}    # git has none; this is the template's example"
    return f"cp TEMPLATE/{name} .    # git has none: take it from a clone of the template"


def _loaded(at: Layout) -> Declaration | None:
    """Read a declaration of which only a file that it names is wrong."""
    from pipelines import declaration  # noqa: PLC0415 - pydantic

    try:
        return declaration.load(at.params)
    except FleetError:
        return None


def _declaration(found: Declaration) -> Iterator[Line]:
    from pipelines import declaration  # noqa: PLC0415 - pydantic

    counts = ", ".join(
        wording.counted(len(getattr(found, name)), name.removesuffix("s"))
        for name in ("models", "quants", "hosts")
    )
    late = declaration.over_waivers(found, datetime.now(UTC).strftime("%Y-%m-%d"))
    if late:
        fix = "Renew or remove the waiver in params.yaml."
        yield warn("repository", "waivers", wording.first_few(late), fix)
    if [model.source for model in found.models.values()] == [_EXAMPLE]:
        text = f"{counts}; the only model is the template's example"
        yield warn("repository", "declaration", text, "fleet init hf:OWNER/REPO")
    else:
        yield ok("repository", "declaration", counts)


def looks(at: Layout, found: Declaration | None, *, bare: bool, offline: bool) -> dict[str, Look]:
    """
    Return every look but that at the declaration, by name, in the order in which they are shown.

    Args:
        at: The checkout; its root may be no fleet at all.
        found: Its declaration, if it has a good one.
        bare: Packages are missing: look at what needs none.
        offline: Ask no server.
    """
    plain: dict[str, Look] = {
        "template": lambda: _template(at, bare=bare),
        "code": lambda: doctor_code.lines(at.root),
        "git": lambda: _git(at, found),
        "dvc-config": lambda: _dvc_config(at),
        "killed": lambda: _killed(at, bare=bare),
    }
    if bare:
        return plain
    return plain | {
        "graph": lambda: _graph(at, found),
        "lock": lambda: _lock(at, found, offline=offline),
        "host-records": lambda: _host_records(at),
        "ledger": lambda: _ledger(at),
        "generated": lambda: _generated(at),
        "workflows": lambda: _workflows(at),
        "toolchain": lambda: _toolchain(found),
    }


def lines(at: Layout, found: Declaration | None, *, bare: bool, offline: bool) -> list[Line]:
    """Look at everything but the declaration; see `looks`."""
    return [
        line
        for name, look in looks(at, found, bare=bare, offline=offline).items()
        for line in doctor_lines.looked("repository", name, look)
    ]


# --- git --------------------------------------------------------------------------------------


def _git(at: Layout, found: Declaration | None) -> Iterator[Line]:
    """See whether everything of the operator's is in git."""
    try:
        # With a name in it, since a folder below another repository is no repository of ours.
        inside = _ask(at, "rev-parse", "--is-shallow-repository").strip()
    except FleetError as error:
        if "not a git repository" not in error.message:
            raise
        yield fail(
            "repository",
            "git",
            "no git repository; DVC and every comparison need one",
            "git init --initial-branch main && git add --all && git commit --message 'Begin'",
        )
        return
    if inside == "true":
        text = "a shallow clone: no pull request can be compared with where its branch began"
        yield warn("repository", "git", text, "git fetch --unshallow")
    mine = [*owners.OPERATOR, *_sources(found)]
    changed: list[tuple[str, str]] = []
    told = iter(
        _ask(
            at, "status", "--porcelain=v1", "-z", "--", *(path.rstrip("/") for path in mine)
        ).split("\0")
    )
    for each in told:
        # A declaration that is gone has a line of its own; nobody is told to commit that.
        if each and (each[3:] != at.params.name or at.params.exists()):
            changed.append((each[:2], each[3:]))
        if each[:1] in {"R", "C"}:
            next(told, None)  # where it came from
    if conflicts := [path for state, path in changed if state in _CONFLICTS]:
        yield fail(
            "repository",
            "committed",
            f"conflicts of a merge in {wording.first_few(conflicts)}",
            "git status    # docs/chain.md says how dvc.lock is put right: `fleet repro`",
        )
    elif changed:
        paths = wording.first_few(sorted(path for _, path in changed))
        yield warn(
            "repository",
            "committed",
            f"{wording.counted(len(changed), 'path')} of the operator's not as in git: {paths}",
            "git diff HEAD    # and if that is right:\n"
            f"git add -- {' '.join(_named(changed, mine))}\ngit commit --message 'Records'",
        )
    else:
        yield ok("repository", "committed", "declaration, records and lock are as in git")


def _sources(found: Declaration | None) -> list[str]:
    """Return the folders of models that are in the repository."""
    kinds = (model.source.partition(":") for model in (found.models.values() if found else ()))
    paths = {PurePosixPath(path) for kind, _, path in kinds if kind == "path"}
    return sorted(f"{p}/" for p in paths if not p.is_absolute() and ".." not in p.parts)


def _named(changed: list[tuple[str, str]], mine: list[str]) -> list[str]:
    """Return which of the operator's paths hold what changed, as they are typed."""
    return [
        shlex.quote(one)
        for one in mine
        if any(path.startswith(one.rstrip("/")) for _, path in changed)
    ]


def _ask(at: Layout, *words: str) -> str:
    said = proc.answer(
        ["git", "-C", str(at.root.resolve()), *words],
        env={"LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0"},
        within_s=_GIT_WITHIN_S,
    )
    return said.decode(errors="replace")


def _template(at: Layout, *, bare: bool) -> Iterator[Line]:
    """Say which version of the template this is, and where its next one comes from."""
    if not (at.root / "dvc.yaml").exists():
        text = f"no fleet here: {at.root.resolve()} has no dvc.yaml"
        yield warn("repository", "template", text, "cd FLEET    # the folder with dvc.yaml")
        return
    try:
        remote = _LOGIN.sub("", _ask(at, "remote", "get-url", "template").strip())
    except FleetError:
        remote = ""
    origin = f"; the next one comes from {remote}" if remote else ""
    text = f"gguf-fleet {__version__}{origin}"
    newest = None if bare else _newest(at)
    if newest is not None and _numbers(newest) > _numbers(__version__):
        text = f"{text}; {newest} is there"
        yield warn("repository", "template", text, "fleet template update --dry-run")
    else:
        yield ok("repository", "template", text)


def _newest(at: Layout) -> str | None:
    """Return the newest version that was fetched; nobody is asked."""
    from pipelines import template  # noqa: PLC0415 - pydantic

    return template.here(at)[1]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


# --- the lock ---------------------------------------------------------------------------------


def _dvc_config(at: Layout) -> Iterator[Line]:
    """See whether DVC can read how it is set up; where it cannot, it says so of every command."""
    for path in (at.root / ".dvc/config", at.root / ".dvc/config.local"):
        name = path.relative_to(at.root).as_posix()
        try:
            configparser.ConfigParser(interpolation=None).read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            fix = f"git checkout HEAD -- {name}" if name == ".dvc/config" else f"Correct {name}."
            text = f"{name} cannot be read: {_place(error)}"
            yield fail("repository", "dvc-config", text, fix)
    if not (at.root / ".dvc/config").is_file():
        fix = "git checkout HEAD -- .dvc/config"
        yield warn("repository", "dvc-config", "there is no .dvc/config", fix)


def _place(error: configparser.Error | UnicodeDecodeError) -> str:
    """Say what is wrong where, and never what stands there: it may be the login of a remote."""
    errors = getattr(error, "errors", None)
    line = errors[0][0] if errors else getattr(error, "lineno", None)
    return type(error).__name__ + (f" in line {line}" if line else "")


def _killed(at: Layout, *, bare: bool) -> Iterator[Line]:
    """Find what a kill leaves and DVC refuses for ever; `fleet repro` puts it right first."""
    for path in (at.root / "dvc.lock", at.root / ".dvc/tmp/rwlock"):
        if path.is_file() and not path.stat().st_size:
            name = path.relative_to(at.root).as_posix()
            text = f"{name} is empty: a run was killed while DVC wrote it"
            yield warn("repository", "killed", text, "fleet repro    # repairs it first")
    if bare:
        return
    from pipelines import orphans  # noqa: PLC0415 - psutil

    if left := orphans.left_over(at.root):
        text = f"{wording.counted(len(left), 'program')} of a killed run still work here"
        yield warn("repository", "killed", text, "fleet repro    # ends them first")


def _graph(at: Layout, found: Declaration | None) -> Iterator[Line]:
    """See that dvc.yaml has every stage of this version; no fork edits it."""
    from pipelines import coverage  # noqa: PLC0415 - pydantic

    if found is not None and (at.root / coverage.GRAPH).exists():
        try:
            coverage.steps_of(found, at.root / coverage.GRAPH)
        except ParamsError as error:
            fix = f"git checkout HEAD -- {coverage.GRAPH}"
            yield fail("repository", "graph", error.message, fix)


def _lock(at: Layout, found: Declaration | None, *, offline: bool) -> Iterator[Line]:
    """Hold dvc.lock against the declaration, and its objects against cache and remote."""
    from pipelines import coverage, doctor_objects, lock_entries, marked_yaml  # noqa: PLC0415

    path = at.root / lock_entries.NAME
    if not path.is_file() or not path.stat().st_size:
        text = "no dvc.lock: nothing was measured yet"
        yield warn("repository", "lock", text, "fleet repro")
        yield from doctor_objects.lines(at, {}, {}, offline=offline)
        return
    try:
        stages = lock_entries.parsed(path.read_text(encoding="utf-8"))
    except (FleetError, ValueError) as error:
        hint = error.hint if isinstance(error, FleetError) else "git checkout HEAD -- dvc.lock"
        said = error.message if isinstance(error, FleetError) else f"dvc.lock is no text: {error}"
        yield fail("repository", "lock", said, hint)
        return
    if found is not None:
        yield from doctor_lines.looked("repository", "lock", lambda: _covered(at, found, stages))
        gone = lock_entries.undeclared(stages, found)
        stages = {name: entry for name, entry in stages.items() if name not in gone}
    graph: Mapping[str, Any] = {}
    if (at.root / coverage.GRAPH).is_file():
        data = marked_yaml.read(at.root / coverage.GRAPH).data
        graph = data if isinstance(data, dict) else {}
    yield from doctor_objects.lines(at, stages, graph, offline=offline)


def _covered(at: Layout, found: Declaration, stages: Mapping[str, Any]) -> Iterator[Line]:
    """Say what the next run would do, by the records in git."""
    from pipelines import coverage, lock_entries  # noqa: PLC0415 - pydantic

    covered = coverage.Coverage(found, at)
    runs = [run for model in found.models for run in covered.runs(model)]
    gone = lock_entries.undeclared(stages, found)
    if runs:
        first = runs[0]
        more = f" (and {len(runs) - 1} more)" if len(runs) > 1 else ""
        text = f"{first.stage}@{first.key} has to run: {first.why}{more}"
        yield warn("repository", "lock", text, "fleet repro")
    elif gone:
        text = f"{wording.first_few(list(gone))} of dvc.lock is declared no more"
        yield warn("repository", "lock", text, "fleet repro    # takes it out, with its records")
    else:
        entries = wording.counted(len(stages), "stage")
        yield ok("repository", "lock", f"{entries}, all as params.yaml declares them")


def _host_records(at: Layout) -> Iterator[Line]:
    from pipelines import host_records  # noqa: PLC0415 - pydantic

    if (host := host_records.held(at)) is not None:
        yield warn(
            "repository",
            "host-records",
            f"results/ and dvc.lock hold what host {host} measured, not the first host",
            "git checkout HEAD -- dvc.lock results    # puts back what git has",
        )


def _ledger(at: Layout) -> Iterator[Line]:
    """Read every ledger: each line has its own digest and that of the line before."""
    from pipelines.ledger import Ledger  # noqa: PLC0415 - pydantic

    count = broken = 0
    for path in sorted((at.root / "results").glob("*/ledger.jsonl")):
        try:
            count += len(Ledger.load(path, path.parent.name).lines)
        except FleetError as error:
            broken += 1
            yield doctor_lines.of_error("repository", "ledger", error)
    if not broken:
        moves = wording.counted(count, "line")
        yield ok("repository", "ledger", f"{moves}, each with its digest" if count else "no move")


# --- what the template generates and checks ---------------------------------------------------


def _generated(at: Layout) -> Iterator[Line]:
    """Hold the schema and the generated pages against the code."""
    from pipelines import schema  # noqa: PLC0415 - pydantic

    if not (at.root / "dvc.yaml").exists() or doctor_code.differs(at.root):
        return  # What another checkout would generate says nothing of this one.
    if stale := schema.in_sync(at.root):
        text = f"{wording.first_few(stale)} is not what this code generates"
        yield fail("repository", "generated", text, "fleet schema --write")
    else:
        yield ok("repository", "generated", "schemas and generated pages are those of this code")


def _workflows(at: Layout) -> Iterator[Line]:
    """Hold pins, workflows, actions and owners against the rules of `make check`."""
    if not (at.root / ".github/workflows").is_dir():
        text = "no .github/workflows: nothing runs on GitHub"
        yield warn("repository", "workflows", text, "git checkout HEAD -- .github")
        return
    try:
        from checks import files, policy, rules_repository  # noqa: PLC0415 - only where they lie
    except ModuleNotFoundError:
        yield warn("repository", "workflows", "no checks/ here", "git checkout HEAD -- checks")
        return
    repository = files.read(at.root)
    findings = policy.judge(repository)
    for name, rules, well in (
        ("pins", _PINS, "every action of others is the commit of .github/pins.yaml"),
        ("owners", _OWNERS, ".github/CODEOWNERS covers what decides what runs"),
        ("workflows", None, f"{len(repository.workflows)} keep the rules of make check"),
    ):
        mine = [
            each
            for each in findings
            if (each.rule in rules if rules is not None else each.rule not in _PINS | _OWNERS)
        ]
        if mine:
            more = f" (and {len(mine) - 1} more)" if len(mine) > 1 else ""
            yield fail("repository", name, f"{mine[0]}{more}", "make check")
        elif name == "owners" and (nobody := rules_repository.unowned(repository)):
            yield warn("repository", name, nobody, "fleet init --owner @YOUR-LOGIN --yes")
        else:
            yield ok("repository", name, well)


def _toolchain(found: Declaration | None) -> Iterator[Line]:
    """Hash every file of the llama.cpp that this machine has built."""
    if found is None:
        return
    tools = toolchain.there(toolchain.spec_of(found))
    if tools is None:
        text = f"llama.cpp of llama-cpp-python {found.toolchain.llama_cpp_python} is not built here"
        yield warn(
            "repository", "toolchain", text, "fleet toolchain    # 9 to 17 minutes on 2 cores"
        )
        return
    try:
        tools.verify()
    except DigestError as error:
        text = " ".join(error.message.splitlines()[:2])
        fix = f"rm -r '{tools.prefix}'\nfleet toolchain"
        yield fail("repository", "toolchain", console.clean(text), fix, code=error.exit_code)
        return
    value = f"llama.cpp {tools.commit[:9]} for {tools.backend}, every file as it was built"
    yield ok("repository", "toolchain", value)
