"""
llama-fit-params: the memory that llama.cpp plans for.

Sources: tools/fit-params/fit-params.cpp and common/fit.cpp at the pinned commit; outputs recorded
in tests/data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.llamacpp import LOG_OPTIONS, refuse, refuse_errors

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.llamacpp import Execution
    from pipelines.toolchain import Toolchain


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """
    Memory in MiB that llama.cpp plans for: weights, key-value cache, working space.

    Each term of each device is rounded down to a whole MiB by the tool, so a sum is up to a MiB
    too small for each term.
    """

    model_mib: float
    context_mib: float
    compute_mib: float

    @property
    def total_mib(self) -> float:
        """All three together."""
        return self.model_mib + self.context_mib + self.compute_mib


def estimate_argv(
    tools: Toolchain, model: str, *, context_tokens: int, execution: Execution
) -> list[str]:
    """
    Ask for the planned memory; only the header of the model is read.

    Repacking is off here: the tool leaves repacked weights out of its table (they lie in a buffer
    type of their own), and they take as many bytes as they did before.
    """
    return [
        str(tools.tool("llama-fit-params")),
        *("-m", model, "-c", str(context_tokens), "-np", "1", "-fitp", "on", "--no-repack"),
        *(*execution.argv(), *LOG_OPTIONS),
    ]


_ESTIMATE_LINE = re.compile(r"(\S+(?: \S+)*?) (\d{1,9}) (\d{1,9}) (\d{1,9}) ")
_HOST = "Host"


def parse_estimate(stdout: str, stderr: str, *, on_gpu: bool, log: Path) -> MemoryEstimate:
    """
    Read one line for each device, `NAME model context compute `, of which Host is the last.

    Args:
        stdout: The table.
        stderr: The messages; an error voids the run.
        on_gpu: Add the devices up, rather than what stays in main memory.
        log: File with the whole output, for the error.

    Raises:
        ToolError: A line has another form, a device is there twice, Host is not the last, there
            is no GPU although one is used, or all is zero.
    """
    refuse_errors("llama-fit-params", stderr, log)
    table: dict[str, tuple[int, int, int]] = {}
    lines = stdout.splitlines()
    for line in lines:
        found = _ESTIMATE_LINE.fullmatch(line)
        if found is None or found[1] in table:
            refuse(f"llama-fit-params printed {line[:120]!r}, which is no new device.", log)
        table[found[1]] = (int(found[2]), int(found[3]), int(found[4]))
    if not stdout.endswith("\n") or not lines or list(table)[-1] != _HOST:
        refuse("llama-fit-params did not end its table with the line of the host.", log)
    rows = [row for name, row in table.items() if (name != _HOST) == on_gpu]
    if not rows:
        refuse("llama-fit-params lists no GPU, although the layers are to lie on one.", log)
    model, context, compute = (sum(column) for column in zip(*rows, strict=True))
    if model + context + compute == 0:
        refuse("llama-fit-params says that the model needs no memory at all.", log)
    return MemoryEstimate(model_mib=model, context_mib=context, compute_mib=compute)
