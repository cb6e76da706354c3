"""
docs/errors.md: what the fleet says when it stops, what that means, and what to do.

First what most people meet, by hand; then every error of the code, as `pipelines.error_sites` reads
them, by exit code and by what the fleet was doing.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from itertools import groupby
from typing import TYPE_CHECKING, Final, NamedTuple

from pipelines import error_sites

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipelines.error_sites import Site

PAGE_FILE: Final = "docs/errors.md"

_DECLARATION: Final = (
    "Nothing was done. Correct the file or the arguments; `fleet check` shows every problem of "
    "params.yaml at once, with its line."
)
_PROGRAM: Final = (
    "A program failed, was killed, or printed what cannot be trusted. Nothing of it was taken; the "
    "whole output is in the file after `log:`."
)
_VERDICT: Final = "The work was done; what came out is worse than what was asked for."
_MACHINE: Final = (
    "It lacks something: a compiler, disk, memory, a driver. `fleet doctor` looks for all of it at "
    "once."
)
_STORE: Final = "It refused or lost something. What was begun is told; the same command goes on."
# Exit code to its name, and to what it means to who started the verb.
_CODES: Final = {
    2: ("The declaration or the command line", _DECLARATION),
    3: ("The source of a model", "A person has to decide: waiting changes nothing."),
    4: ("A program", _PROGRAM),
    5: ("A verdict, or a move that would undo another", _VERDICT),
    6: ("Wrong bytes", "Bytes are not those that were declared. Nothing of them was kept."),
    7: ("This machine", _MACHINE),
    8: ("A registry, a server, GitHub", _STORE),
    75: ("Not now", "Out of reach, or busy. The same command later is all that it takes."),
    1: ("The rest", "A record or an answer that does not fit."),
}
# What is going on, with the modules that do it; the first that fits counts.
_AREAS: Final = {
    "A fork's life: init, doctor, template": (
        "init", "init_*", "doctor", "doctor_*", "template", "template_*", "migrations*", "owners",
    ),
    "Declaration, texts and the command line": (
        "__main__", "params", "declaration", "marked_yaml", "pin_lines", "corpora", "prompts",
        "evals", "evals_*", "tensor_rules", "what_if", "limits", "inputs", "*_verbs",
        "stable_line", "objectives", "regressions",
    ),
    "Fetching, the Hub": (
        "fetch", "fetch_*", "hub", "hub_*", "safetensors_header", "source_tensors",
    ),
    "When upstream moves": (
        "bump", "bump_*", "check_upstream", "upstream_*", "engine_releases", "go_versions",
        "package_index", "pip_page", "watch", "mainline", "version_tags",
    ),
    "Toolchain and machine": (
        "toolchain", "toolchain_*", "bootstrap", "machine", "gpu", "disk", "proc", "llamacpp",
        "gguf_py", "architectures", "runner", "runner_*", "health_*", "locks", "apart", "hashing",
        "atomic", "trees", "console",
    ),
    "Conversion and quants": (
        "convert", "verify", "verify_*", "calibrate", "quantize", "quant_values", "tensor_*",
        "gguf_header", "gguf_tokens", "hyperparameters", "explain",
    ),
    "Measuring and choosing": (
        "benchmark", "llama_*", "measuring", "validity*", "evaluate", "evaluate_*", "choose",
        "embedding_quality", "compare", "compare_*", "degenerate", "golden", "counters", "harm",
    ),
    "Serving and load": (
        "serving.*", "load", "load.*", "load_*", "serve",
    ),
    "Releases and registries": (
        "publish", "publish_*", "publishing", "release", "release_*", "releases", "stores.*",
        "registr*", "ledger", "moves", "rollback*", "pull", "audit", "reading", "modelpack",
        "gguf_carrier", "certificate", "model_card", "retire", "track", "mlflow_*", "checksums",
    ),
    "Pull requests and GitHub": (
        "github.*", "plan", "plan_*", "bundle", "bundle_*", "gate", "adopt", "comment",
        "comment_*", "propose", "ci_records", "coverage", "lock_entries", "dvc_state",
    ),
    "Records, report and everything else": (
        "*",
    ),
}  # fmt: skip


class Common(NamedTuple):
    """
    One error that a new operator meets.

    Attributes:
        said: Words of the message, as the code has them: a test looks them up there.
        why: What is behind it.
        do: What to do, as Markdown.
    """

    said: str
    why: str
    do: str


COMMON: Final = (
    Common(
        "there is no params.yaml in",
        "the command was typed outside of a fleet",
        "`cd` to the folder with params.yaml",
    ),
    Common(
        "is no key here",
        "a key of params.yaml is misspelt, or stands one level too high or too low",
        "the error names line, column and the keys that are allowed: [params.md](params.md)",
    ),
    Common(
        "cannot be compiled here",
        "no C++ compiler, cmake or ninja on PATH",
        "install what the hint names for your system, then `fleet toolchain`",
    ),
    Common(
        "No CUDA compiler (nvcc) found",
        "`toolchain.backend` asks for CUDA (or `auto` found a card), and there is no toolkit",
        "install the CUDA toolkit of your driver, or declare `backend: cpu`: [toolchain.md]"
        "(toolchain.md)",
    ),
    Common(
        "No Ollama can be had",
        "neither Ollama nor Go is here, and `serving.engine` is `ollama`",
        "install one of them; `engine: auto` goes on with llama-server, whose releases are HOLD",
    ),
    Common(
        "is gated.",
        "upstream gives its files only to those who accepted its conditions",
        "accept them on the model's page, then set `HF_TOKEN`; on GitHub as secret of the "
        "environment `bot`",
    ),
    Common(
        "does not exist, or this machine may not see it",
        "a typing error in `source`, or a private repository without `HF_TOKEN`",
        "open https://huggingface.co/OWNER/REPO in a browser; set `HF_TOKEN`",
    ),
    Common(
        "the weights are only there as pickles",
        "pickles can run code when they are loaded, so they are never opened",
        "take a revision or a repository with `*.safetensors`",
    ),
    Common(
        "holds GGUFs only",
        "the repository is somebody's quants: there is nothing to hold new ones against",
        "take the repository that its card names as `base_model`",
    ),
    Common(
        "does not fit on",
        "by the estimate of `fleet init` the file and its context need more memory than the host "
        "has",
        "a smaller type (`--quants`), less `--context`, a smaller model; `--quants` with a type "
        "declares it all the same, and the measurement decides",
    ),
    Common(
        "says that the model is quantized already",
        "quants are made from the original weights only, or nobody could say what they lost",
        "declare the repository that it was made of; its card names it",
    ),
    Common(
        "the files are not the declared ones",
        "a `path:` source was edited after its `revision` was declared",
        "take back the edit, or declare what `fleet digest PATH` prints",
    ),
    Common(
        "declared is",
        "a corpus or a set of tasks was edited: every number that was measured on it is of another "
        "text",
        "`git checkout -- FILE`, or declare the new `sha256` and measure again",
    ),
    Common(
        "the disk filled up",
        "a model needs its source, the 16-bit GGUF and every quant at once",
        "make room, and run the same command again: it goes on; `fleet quantize QUANT --explain` "
        "says how large a quant will be",
    ),
    Common(
        "were not enough",
        "a download took longer than `fetch.deadline_minutes`",
        "run the same command again: it goes on where it stopped",
    ),
    Common(
        "not every model is promoted",
        "`fleet report --strict` says by its exit code what the report says in words",
        "read `results/report.md`: each reason names value, limit and record; "
        "[verdict.md](verdict.md)",
    ),
    Common(
        "DVC's remote does not have",
        "it was measured on another machine, whose files were not pushed",
        "`dvc push` there, or `fleet repro MODEL` here",
    ),
    Common(
        "was rolled back to",
        "somebody went back to an older release, and this checkout does not know yet",
        "`git pull`, or merge the pull request of the rollback; to end it: `fleet rollback MODEL "
        "--to latest --reason TEXT`",
    ),
)

_INTRODUCTION: Final = """\
# Errors

<!-- Generated by `fleet schema --write` from the errors in pipelines/: edit the messages there. -->

When a verb stops, it says what happened, where the whole output is (`log:`) and the next thing to
do (`next:`). Nothing unfinished has a final name, so the same command goes on. The exit code says
whose turn it is:

| exit code | |
|--:|:--|
| 0 | done |
{codes}| 130 | stopped by Ctrl-C, or politely by another program |

Look for a few words of the message with your browser's search; what varies from case to case stands
in *italics*, and in CAPITALS within a command. A verdict (HOLD, REJECT, INVALID) is no error: see
[verdict.md](verdict.md). What GitHub shows: [github.md](github.md#when-something-does-not-go-on).
What a registry says: [releases.md](releases.md#when-something-is-wrong).

## The commonest

| it says | because | do |
|:--|:--|:--|
{common}"""


def page() -> str:
    """Return the text of docs/errors.md."""
    found = error_sites.sites()
    text = _INTRODUCTION.format(
        codes="".join(
            f"| {code} | [{name}](#{_slug(code, name)}) |\n" for code, (name, _) in _CODES.items()
        ),
        common="".join(f"| {_markdown(e.said)} | {e.why} | {e.do} |\n" for e in COMMON),
    )
    for code, (name, meaning) in _CODES.items():
        text += f"\n## {code}: {name}\n\n{meaning}\n"
        ours = sorted((_area(site.module), site) for site in found if site.exit_code == code)
        for area, rows in groupby(ours, key=lambda each: each[0]):
            text += (
                f"\n### {code}: {list(_AREAS)[area]}\n\n| it says | do | from |\n|:--|:--|:--|\n"
            )
            text += _rows(site for _, site in rows)
    return text


def _rows(sites: Iterable[Site]) -> str:
    """One line for each message; where several modules say the same, the first is named."""
    said: dict[tuple[str, str], str] = {}
    for site in sites:
        said.setdefault((site.message, site.hint), site.module)
    return "".join(
        f"| {_markdown(message)} | {_markdown(hint)} | {_link(module)} |\n"
        for (message, hint), module in said.items()
    )


def _area(module: str) -> int:
    return next(
        number
        for number, patterns in enumerate(_AREAS.values())
        if any(fnmatchcase(module, pattern) for pattern in patterns)
    )


def _link(module: str) -> str:
    path = error_sites.PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    inside = path.relative_to(error_sites.PACKAGE).as_posix()
    return f"[{module.removeprefix('__').removesuffix('__')}](../pipelines/{inside})"


def _slug(code: int, name: str) -> str:
    """Return the anchor that GitHub gives to the heading of an exit code."""
    return re.sub(r"[^a-z0-9 -]", "", f"{code}: {name}".lower()).replace(" ", "-")


_CODE: Final = re.compile(r"(`[^`]*`)")
_WORD: Final = re.compile(r"<([^<>]*)>")
_SPECIAL: Final = re.compile(r"([\\*_\[\]#~|])")


def _markdown(text: str) -> str:
    """Show a message in a table: its own marks mean themselves, `<word>` is in italics."""
    parts = _CODE.split(text) if text.count("`") % 2 == 0 else [text.replace("`", "'")]
    shown = [
        _WORD.sub(lambda word: word[1].upper(), part).replace("|", "\\|")
        if part.startswith("`")
        else _prose(part)
        for part in parts
    ]
    return "".join(shown)


def _prose(text: str) -> str:
    escaped = _SPECIAL.sub(r"\\\1", text).replace("&", "&amp;")
    words = _WORD.sub(lambda word: f"\0{word[1]}\1", escaped)
    plain = words.replace("<", "&lt;").replace(">", "&gt;")
    # Two side by side would be read as bold.
    return plain.replace("\1\0", "\1 \0").replace("\0", "*").replace("\1", "*")
