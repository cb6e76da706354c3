"""
Every way in which a verb can fail, and the exit code of each.

    FleetError                    1   something we did not foresee is wrong
    ├── ParamsError               2   the declaration is wrong: params.yaml, a corpus, an argument
    ├── UpstreamError             3   the source of a model is wrong: a person has to decide
    │   └── RetryLaterError      75   the source is out of reach now: try again later
    ├── ToolError                 4   a program failed, or printed what cannot be trusted
    ├── GateError                 5   a verdict is worse than the caller accepts (`--strict`)
    ├── DigestError               6   bytes are not the bytes that were declared
    ├── MachineError              7   the machine lacks something: compiler, disk, memory, driver
    └── StoreError                8   a registry or tracking server refused or lost something

An error says what happened and carries its evidence; `hint` is the next thing to type. It is
raised where the fact is known and turned into text in one place, `pipelines.__main__.main`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class FleetError(Exception):
    """A failure that the operator can understand and act on; never shown with a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", log: Path | None = None) -> None:
        """
        Describe one failure.

        Args:
            message: What happened, with its evidence.
            hint: The next step to take, in the imperative; may be empty.
            log: File that holds the whole output of the program that failed.
        """
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.log = log


class ParamsError(FleetError):
    """The declaration is wrong. Carries every problem at once, each with its place."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", problems: Iterable[Problem] = ()) -> None:
        """Describe what is wrong; `problems` are the single findings, in file order."""
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class Problem:
    """One finding in one file: what the editor and the pull request show on that very line."""

    __slots__ = ("column", "file", "line", "text")

    def __init__(self, file: str, line: int, column: int, text: str) -> None:
        """Place `text` at a 1-based line and column of `file`."""
        self.file = file
        self.line = line
        self.column = column
        self.text = text

    def __str__(self) -> str:
        """Render as compilers do, so that editors can jump to it."""
        return f"{self.file}:{self.line}:{self.column}: {self.text}"


class UpstreamError(FleetError):
    """The source of a model is wrong: gone, gated, of an architecture that nobody converts."""

    exit_code = 3


class RetryLaterError(UpstreamError):
    """The source cannot be reached now; 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class ToolError(FleetError):
    """A program that we started failed, was killed, or printed what cannot be trusted."""

    exit_code = 4


class GateError(FleetError):
    """A verdict is worse than what the caller asked for."""

    exit_code = 5


class DigestError(FleetError):
    """Bytes differ from their declared digest. Nothing was kept of them."""

    exit_code = 6


class MachineError(FleetError):
    """The machine lacks something that the work needs."""

    exit_code = 7


class StoreError(FleetError):
    """A registry or a tracking server refused or lost something."""

    exit_code = 8
