"""
How Python programs run that read a stranger's files: apart, and with next to nothing.

A converter or a tokenizer is a large library that reads what anybody may have written. So it gets
none of our environment but PATH, no GPU, a home that is thrown away, and an audit hook that lets
Python code, its own or that of a library, open no connection and start no program. A tokenizer that
"needs" remote code fails there instead of running. It is a net for honest mistakes and no sandbox:
native code does not pass through Python's audit hooks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

# Modules of the packages that the extra `convert` of pyproject.toml brings, itself or through one.
_PACKAGES: Final = frozenset({
    "gguf", "google", "huggingface_hub", "jinja2", "numpy", "safetensors", "sentencepiece",
    "tokenizers", "torch", "transformers",
})  # fmt: skip

# argv: who is told of, `-m` and a module or the path of a script, then its own arguments.
_LAUNCHER: Final = """
import runpy, sys
who = sys.argv[1]
def refuse(event, args):
    if event in REFUSED:
        raise PermissionError(who + " may not use " + event + " " + repr(args)[:200])
REFUSED = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
           "socket.sendmsg", "socket.bind", "subprocess.Popen", "os.system", "os.exec", "os.spawn",
           "os.posix_spawn", "os.fork", "os.forkpty"}
is_module = sys.argv[2] == "-m"
sys.argv = sys.argv[3:] if is_module else sys.argv[2:]
if not is_module:
    sys.path.insert(0, sys.argv[0].rpartition("/")[0])
sys.addaudithook(refuse)
if is_module:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(who: str, path: Path, *words: str | Path) -> list[str | Path]:
    """
    Return the command that runs a Python file as `python path ...` would, with the hook.

    Args:
        who: Begins the message of a refusal: "the converter".
        path: The file.
        words: Its arguments.
    """
    return [sys.executable, "-c", _LAUNCHER, who, path, *words]


def module(who: str, name: str, *words: str | Path) -> list[str | Path]:
    """
    Return the command that runs a module of ours as `python -m name ...` would, with the hook.

    `environment(..., ours=True)` is what lets it be found.
    """
    return [sys.executable, "-c", _LAUNCHER, who, "-m", name, *words]


def environment(scratch: Path, *, ours: bool = False) -> dict[str, str]:
    """
    Return all that such a program sees of our environment besides PATH.

    Args:
        scratch: Directory for its home and its temporary files; the caller removes it.
        ours: Let it import our own modules, too.
    """
    seen = {
        "HOME": str(scratch.absolute()),
        "TMPDIR": str(scratch.absolute()),
        "HF_HOME": str(scratch.absolute()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Files pass through the CPU one by one; a GPU that benchmarks must not be touched.
        "CUDA_VISIBLE_DEVICES": "",
        # Where a check of llama.cpp fails, it would start a debugger on itself; how it ended is
        # known without, and the native start of one is what the hook does not see.
        "GGML_NO_BACKTRACE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "LC_ALL": "C.UTF-8",
    }
    if ours:
        seen["PYTHONPATH"] = str(Path(__file__).absolute().parent.parent)
        seen["PYTHONDONTWRITEBYTECODE"] = "1"
    return seen


def is_package(error: ModuleNotFoundError) -> bool:
    """Tell whether what is missing comes with the extra `convert`, and is no module of ours."""
    return (error.name or "").partition(".")[0] in _PACKAGES


def is_ours(error: ImportError) -> bool:
    """
    Tell whether a module of this template is what could not be imported.

    For programs in which a library imports: it may say in words alone, without a name, which of the
    packages that it can do with is missing.
    """
    return (error.name or "").partition(".")[0] == __name__.partition(".")[0]
