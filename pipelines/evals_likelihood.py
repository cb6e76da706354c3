"""
Which choice of a multiple choice a model takes: the one with the highest log-likelihood per byte.

The sum over the tokens of a choice favours short ones; divided by its bytes in UTF-8 it does not,
whatever the tokenizer (`acc_norm` of lm-evaluation-harness divides alike, by characters). A tie of
the right choice with another one is not right.

llama.cpp's server leaves out the log-probabilities of a prompt, silently. So they are computed by
the libraries of the toolchain, in a process of its own: `pipelines/evals_scorer.py`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipelines import console, llamacpp, proc
from pipelines.errors import ParamsError, ToolError
from pipelines.evals import MultipleChoice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.evals import EvalSet
    from pipelines.serving.server import Settings
    from pipelines.toolchain import Toolchain

_SCORER: Final = Path(__file__).with_name("evals_scorer.py")


def rights(  # noqa: PLR0913 - each is one independent fact
    set_: EvalSet,
    gguf: Path,
    settings: Settings,
    *,
    tools: Toolchain,
    scratch: Path,
    log: Path,
    on_item: Callable[[float], None],
) -> list[tuple[bool, str]]:
    """
    Score all items of a set with one file.

    Args:
        set_: A multiple choice.
        gguf: The file; its digest has been proven.
        settings: Context, threads and layers on the GPU.
        tools: Has the libraries.
        scratch: Directory for the request.
        log: Gets what llama.cpp says.
        on_item: Called with the number of items done.

    Returns:
        For each item whether the right choice was taken, and the log-likelihoods as text.

    Raises:
        ParamsError: An item cannot be done with this model.
        ToolError: The scorer failed, or its answers are not those of the set.
    """
    items = [item for item in set_.items if isinstance(item, MultipleChoice)]
    scratch.mkdir(parents=True, exist_ok=True)
    done = 0

    def count(line: str) -> None:
        nonlocal done
        done += line.startswith('{"nats"')
        on_item(done)

    with tempfile.TemporaryDirectory(prefix=".request-", suffix=".part", dir=scratch) as folder:
        request = Path(folder) / "request.json"
        request.write_text(
            json.dumps(
                {
                    "model": str(gguf.absolute()),
                    "threads": settings.threads,
                    "gpu_layers": settings.gpu_layers,
                    "context_tokens": settings.context_tokens,
                    "items": [{"prompt": i.prompt, "choices": i.choices} for i in items],
                }
            ),
            encoding="utf-8",
        )
        ended = proc.run(
            # -P: the folder of the program is our package, which nobody may import by its parts.
            [sys.executable, "-P", _SCORER, request],
            log=log,
            env=llamacpp.environment(tools) | tools.python_env() | {"PYTHONUTF8": "1"},
            inherit_env=False,
            on_line=count,
        )
    answers = _answers(ended.stdout, log)
    for answer in answers:
        if "problem" in answer:
            raise _problem(set_, answer)
    if [len(answer["nats"]) for answer in answers] != [len(item.choices) for item in items]:
        raise ToolError("the scorer of multiple choices did not answer every choice.", log=log)
    return [
        (takes(item, answer["nats"]), json.dumps(answer["nats"]))
        for item, answer in zip(items, answers, strict=True)
    ]


def takes(item: MultipleChoice, nats: Sequence[float]) -> bool:
    """
    Tell whether the right choice of an item is the likeliest one for each byte.

    Args:
        item: With its choices.
        nats: Log-likelihood of each, in nats.

    Raises:
        ToolError: One is not finite, or above 0.
    """
    if not all(math.isfinite(each) and each <= 0 for each in nats):
        raise ToolError(f"item {item.id}: {list(nats)} are no log-likelihoods.")
    each_byte = [
        sum_ / len(choice.encode()) for sum_, choice in zip(nats, item.choices, strict=True)
    ]
    others = each_byte[: item.answer] + each_byte[item.answer + 1 :]
    return each_byte[item.answer] > max(others)


def _answers(stdout: str, log: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in stdout.splitlines()]
    except ValueError as error:
        raise ToolError("the scorer of multiple choices printed no JSON.", log=log) from error


def _problem(set_: EvalSet, answer: dict[str, Any]) -> ParamsError:
    """Say which item a model cannot do, with its line: items stand on one each."""
    number = int(answer["item"])
    return ParamsError(
        f"{set_.declared.path}:{number + 1}: {set_.items[number].id}: "
        f"{console.clean(str(answer['problem']))}.",
        hint="Shorten the item or leave it out; a prompt ends in a whole word and a choice begins "
        "with the blank.",
    )
