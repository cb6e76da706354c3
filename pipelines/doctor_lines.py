"""
One line of `fleet doctor`: what was looked at, whether it is well, and what to paste if it is not.

Every look is one or several lines, also one that broke: whoever asks a doctor has trouble already,
and a look that ends half-way would hide the rest.

    from pipelines.doctor_lines import Line, fail, looked, ok, warn

    def lines(at, declared):
        return looked("github", "runners", lambda: _runners(at, declared))
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from pipelines import at_once, console, proc
from pipelines.errors import FleetError, GateError, MachineError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from pipelines.health_records import Finding

Area: TypeAlias = Literal["machine", "repository", "github", "security"]
State: TypeAlias = Literal["ok", "warn", "fail"]

Look: TypeAlias = "Callable[[], Iterable[Line]]"

AREAS: Final[tuple[Area, ...]] = ("machine", "repository", "github", "security")
# Seconds that a server or a program that somebody else wrote may take to answer.
ANSWER_WITHIN_S: Final = 3.0
# What a line that fails ends with, where no error says it better; see `pipelines.errors`.
_CODES: Final[Mapping[Area, int]] = {
    "machine": MachineError.exit_code,
    "repository": ParamsError.exit_code,
    "github": ParamsError.exit_code,
    "security": ParamsError.exit_code,
}
# Of what a runner's probe found: what it could not ask is neither well nor sick.
_STATES: Final[Mapping[str, State]] = {
    "ok": "ok", "unknown": "warn", "warn": "warn", "sick": "fail",
}  # fmt: skip
_AGAIN: Final = "Correct that, then: fleet doctor"
_LONGEST: Final = 500
_COLOURS: Final[Mapping[State, str]] = {"ok": "green", "warn": "yellow", "fail": "red"}
# Of `git remote get-url`: https://HOST/OWNER/NAME.git, git@HOST:OWNER/NAME, ssh://git@HOST/...
_REMOTE: Final = re.compile(
    r"(?:https?://(?:[^/@\s]+@)?|ssh://(?:[^/@\s]+@)?|git@)(?P<host>[^/:\s]+)(?::\d+)?[/:]"
    r"(?P<slug>[A-Za-z0-9][A-Za-z0-9-]{0,99}/[A-Za-z0-9._-]{1,100}?)(?:\.git)?/?"
)


@dataclass(frozen=True)
class Line:
    """
    One thing that was looked at.

    Attributes:
        area: What it belongs to.
        name: Its name, stable from version to version: `disk`, `runners`.
        state: ok; warn: works, but not as it should, or could not be seen; fail: does not work.
        text: What was found, with its unit and what it is held against.
        fix: What to paste, or to do, line by line; empty where all is well.
        exit_code: Of the verb, if this is the first line that fails; 0 of the others.
    """

    area: Area
    name: str
    state: State
    text: str
    fix: str = ""
    exit_code: int = 0


def ok(area: Area, name: str, text: str) -> Line:
    """Say that something is well."""
    return Line(area, name, "ok", _one_line(text))


def warn(area: Area, name: str, text: str, fix: str) -> Line:
    """Say that something works but should not stay so, or that nobody could see it."""
    return Line(area, name, "warn", _one_line(text), fix.strip())


def fail(area: Area, name: str, text: str, fix: str, *, code: int | None = None) -> Line:
    """Say that something does not work; `code` is that of the error that a run would end with."""
    exit_code = _CODES[area] if code is None else code
    return Line(area, name, "fail", _one_line(text), fix.strip(), exit_code)


def of_error(area: Area, name: str, error: FleetError) -> Line:
    """Say as a failure what a run would end with."""
    return fail(area, name, error.message, error.hint or _AGAIN, code=error.exit_code)


def of_finding(finding: Finding) -> Line:
    """Say what a runner's probe found as a line of the machine."""
    state = _STATES[finding.status]
    text = finding.value + (f" (wanted: {finding.limit})" if finding.limit else "")
    if state == "ok":
        return ok("machine", finding.rule, text)
    made: Callable[..., Line] = warn if state == "warn" else fail
    return made("machine", finding.rule, text, finding.next_step)


def looked(area: Area, name: str, look: Callable[[], Iterable[Line]]) -> list[Line]:
    """Do one look; one that breaks is a warning with its cause, and never a traceback."""
    try:
        return list(look())
    except FleetError as error:
        return [warn(area, name, f"cannot be seen: {error.message}", error.hint or _AGAIN)]
    except Exception as error:  # noqa: BLE001 - a look at a broken machine may break in any way
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        text = f"cannot be seen: {type(error).__name__}: {where}{cause}"
        return [warn(area, name, text, _AGAIN)]


def together(
    area: Area,
    looks: Mapping[str, Callable[[], Iterable[Line]]],
    *,
    within_s: float = ANSWER_WITHIN_S,
) -> list[Line]:
    """
    Do looks that wait for others at once, until one deadline for all of them.

    Args:
        area: What they belong to.
        looks: By the name of their line; one that is not done in time is a warning of that name.
        within_s: Wall seconds.

    Returns:
        Their lines, in the order of `looks`.
    """
    until = at_once.Until(
        last=time.monotonic() + within_s, first=None, answered=lambda: True, asked=frozenset()
    )
    done = at_once.run(
        {
            name: lambda name=name, look=look: looked(area, name, look)  # type: ignore[misc]
            for name, look in looks.items()
        },
        until,
        label="asking",
        unit="questions",
    )
    late = f"no answer within {within_s:.0f} s"
    return [
        line
        for name in looks
        for line in done.get(name, [warn(area, name, late, "Try again, or use --offline.")])
    ]


def exit_code(lines: Iterable[Line], *, strict: bool) -> int:
    """Return that of the first line that fails; 0 without one, or with `strict` 5 for a warning."""
    warned = False
    for line in lines:
        if line.state == "fail":
            return line.exit_code
        warned |= line.state == "warn"
    return GateError.exit_code if strict and warned else 0


def page(lines: Sequence[Line]) -> str:
    """Render for people: one block for each area, each fix below its line, a count at the end."""
    shown: list[str] = []
    width = max((len(line.name) for line in lines), default=0)
    for area in AREAS:
        mine = [line for line in lines if line.area == area]
        if not mine:
            continue
        shown += [_paint(area, "bold")]
        for line in mine:
            sign = _paint(f"{line.state:4}", _COLOURS[line.state])
            shown.append(f"  {sign}  {console.clean(line.name):{width}} {line.text}")
            shown += [
                f"{'':8}{'fix:' if number == 0 else '':{width}} {console.clean(each)}"
                for number, each in enumerate(line.fix.splitlines())
            ]
        shown.append("")
    return "\n".join([*shown, summary(lines)])


def summary(lines: Iterable[Line]) -> str:
    """Count: `31 ok, 2 warnings, 1 failure`."""
    states = [line.state for line in lines]
    warned, failed = states.count("warn"), states.count("fail")
    return (
        f"{states.count('ok')} ok, {warned} warning{'' if warned == 1 else 's'}, "
        f"{failed} failure{'' if failed == 1 else 's'}"
    )


def as_json(lines: Sequence[Line], *, code: int) -> str:
    """Render for programs; `code` is what the verb exits with."""
    counted = {
        state: sum(line.state == state for line in lines) for state in ("ok", "warn", "fail")
    }
    body = {
        "schema_version": 1,
        "exit_code": code,
        **counted,
        "lines": [asdict(line) for line in lines],
    }
    return json.dumps(body, indent=2, ensure_ascii=False)


def token() -> str:
    """Return the token with which GitHub can be asked; empty without one."""
    return os.environ.get("GITHUB_TOKEN") or os.environ.get("GH_TOKEN") or ""


def github_repository(root: Path) -> str | None:
    """
    Return OWNER/NAME on GitHub: $GITHUB_REPOSITORY, else that of the git remote `origin`.

    Returns:
        None if neither says one; a remote of another server than that of GITHUB_API_URL is none.
    """
    if told := os.environ.get("GITHUB_REPOSITORY"):
        return told
    try:
        said = proc.answer(
            ["git", "-C", str(root.resolve()), "remote", "get-url", "origin"],
            within_s=ANSWER_WITHIN_S,
        )
    except FleetError:
        return None
    found = _REMOTE.fullmatch(said.decode(errors="replace").strip())
    server = os.environ.get("GITHUB_SERVER_URL", "https://github.com").split("//")[-1]
    return found["slug"] if found and found["host"].lower() == server.lower() else None


def _paint(text: str, colour: str) -> str:
    """Colour what goes to a terminal; `console.paint` looks at stderr, and this is stdout."""
    return console.paint(text, colour) if sys.stdout.isatty() else text


def _one_line(text: str) -> str:
    return console.clean(" ".join(text.split()))[:_LONGEST]
