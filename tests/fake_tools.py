"""
A toolchain in which one program misbehaves, for faults that the real one cannot be made to show.

The fake is a small Python program. `real` in it is the path of the real program, `argv` its
arguments, and `run()` runs it and returns its exit code.
"""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

from pipelines.toolchain import Toolchain

if TYPE_CHECKING:
    from pathlib import Path

_PROLOGUE = """\
#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
real, argv = {real!r}, sys.argv[1:]

def run(*words):
    return subprocess.run([real, *(words or argv)]).returncode

"""


def with_fake(folder: Path, tools: Toolchain | None, name: str, body: str) -> Toolchain:
    """
    Return a toolchain whose program `name` is `body`; it has no other one.

    Args:
        folder: Where the fake prefix is made.
        tools: The real toolchain, for the path of the real program and for gguf-py.
        name: The program to replace.
        body: Python source.
    """
    program = folder / "bin" / name
    program.parent.mkdir(parents=True, exist_ok=True)
    real = str(tools.tool(name)) if tools else ""
    program.write_text(_PROLOGUE.format(python=sys.executable, real=real) + textwrap.dedent(body))
    program.chmod(0o755)
    if tools and not (folder / "share").exists():
        (folder / "share").symlink_to(tools.prefix / "share", target_is_directory=True)
    manifest = {
        "tools": {name: {}},
        "llama_cpp_python": "0.3.36",
        "llama_cpp_commit": "f" * 40,
        "backend": "cpu",
    }
    return Toolchain(prefix=folder, manifest=manifest)
