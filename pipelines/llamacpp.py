"""
llama.cpp's tools: what all of them are told, and what makes a run of one void.

Each has a module of its own (`llama_bench`, `llama_perplexity`, `llama_fit_params`). A parser there
accepts what the pinned tool prints when all went well, line by line as its printf says, and refuses
everything else: a missing, repeated or unknown line, a number that is cut, not finite, or at odds
with another one that says the same. A wrong number is worse than none.

Every option that can change a number is on the command line, and `environment` keeps out the
variables that could: no default of another llama.cpp and no shell profile decides a measurement.

Source: common/log.cpp of the pinned commit.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from pipelines import gpu
from pipelines.console import clean
from pipelines.errors import ToolError
from pipelines.wording import shortened

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.toolchain import Toolchain


@dataclass(frozen=True, kw_only=True)
class Execution:
    """
    How a model is run, whatever is measured of it.

    Attributes:
        threads: CPU threads.
        gpu_layers: Layers on the GPU; 0 on a CPU build.
        flash_attention: Flash attention, on or off, never "auto".
        kv_type: Type of both halves of the key-value cache.
        batch_tokens: Logical batch.
        ubatch_tokens: Physical batch.
        cpu_moe_layers: First layers whose experts stay in main memory.
    """

    threads: int
    gpu_layers: int
    flash_attention: bool
    kv_type: str
    batch_tokens: int
    ubatch_tokens: int
    cpu_moe_layers: int = 0

    def argv(self) -> list[str]:
        """Spell the options that llama-bench shares with the other tools."""
        return [
            *("-t", str(self.threads), "-ngl", str(self.gpu_layers)),
            *("-fa", "on" if self.flash_attention else "off"),
            *("-ctk", self.kv_type, "-ctv", self.kv_type),
            *("-b", str(self.batch_tokens), "-ub", str(self.ubatch_tokens)),
            *(("-ncmoe", str(self.cpu_moe_layers)) if self.cpu_moe_layers else ()),
        ]


# What a tool sees of our environment besides PATH: where home is, since drivers cache compiled
# kernels there, and which devices there are. Nothing else, for two reasons. OMP_THREAD_LIMIT,
# OMP_DYNAMIC, GGML_CUDA_*, LLAMA_ARG_* and LD_PRELOAD change what is computed or how fast, and the
# tools report the threads that they were told all the same. And a model file is a stranger's:
# whatever reads it needs no HF_TOKEN and no key of a registry.
_INHERITED: Final = frozenset({
    "HOME", "TMPDIR", "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES", "CUDA_CACHE_PATH",
    "GGML_VK_VISIBLE_DEVICES", "VK_DRIVER_FILES", "VK_ICD_FILENAMES", "XDG_DATA_DIRS",
})  # fmt: skip
# Threads that wait for each other in OpenMP's barriers sleep instead of spinning. Where other work
# shares the cores, spinning costs a multiple: the same run of llama-perplexity on two busy cores
# took 9.0 s spinning and 1.2 s sleeping. What comes out is the same. Not for what is timed: a
# server spins as well.
_UNTIMED: Final = {"OMP_WAIT_POLICY": "passive"}
# A tool that aborts would call a debugger, which prints paths of this machine.
_ALWAYS: Final = {"GGML_NO_BACKTRACE": "1"}
_LIBRARY_PATHS: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def environment(tools: Toolchain, *, timed: bool = False) -> dict[str, str]:
    """
    Return all that a tool sees of our environment besides PATH, for `proc.run(inherit_env=False)`.

    A search path for libraries stays, since some systems find the C++ library or the driver only
    by it, but behind our own: the loader asks it before the RUNPATH of our programs, and a
    libggml.so of another llama.cpp that lies there would be measured under our commit.

    Args:
        tools: The toolchain that the program belongs to.
        timed: Whether the time that it takes is a result.
    """
    kept = {name: value for name, value in os.environ.items() if name in _INHERITED}
    libraries = {
        name: f"{tools.prefix / 'lib'}{os.pathsep}{os.environ[name]}"
        for name in _LIBRARY_PATHS
        if os.environ.get(name)
    }
    return kept | libraries | gpu.tool_environment() | _ALWAYS | ({} if timed else _UNTIMED)


# The log has the rest.
_MESSAGE_CHARACTERS: Final = 600

# Levels and times in front of each message, by which an error is told from a result.
LOG_OPTIONS: Final = ("--log-prefix", "--log-timestamps", "--log-colors", "off")


def refuse(message: str, log: Path) -> NoReturn:
    """Reject output: say what is wrong with it and where all of it is."""
    raise ToolError(
        shortened(clean(message), _MESSAGE_CHARACTERS),
        hint="Nothing was taken from this run. Read the log; the same command tries again.",
        log=log,
    )


# `0.00.456.866 E message`, in front of which stdout's half of a line may stand.
_LOGGED_ERROR = re.compile(r"\d+\.\d\d\.\d{3}\.\d{3} E (.*)")


def refuse_errors(program: str, stderr: str, log: Path) -> None:
    """
    Refuse a run that logged an error, whatever its exit code: llama-perplexity ends with 0.

    Raises:
        ToolError: With the first error's own words.
    """
    for line in stderr.splitlines():
        if (found := _LOGGED_ERROR.search(line)) is not None:
            refuse(f"{program} reports an error: {found[1].strip()}", log)
