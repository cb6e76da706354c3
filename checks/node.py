"""GitHub's own libraries for workflows: the scripts of tests/node, asked from Python."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks import installed
from pipelines import proc

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ANSWERS_WITHIN_S = 120.0


def ask(script: str, question: Any) -> Any:  # noqa: ANN401 - any JSON value
    """
    Return the answer of a script of tests/node to a question, both plain JSON.

    Raises:
        MissingError: There is no Node, or its packages cannot be had.
        ToolError: The script failed; the message holds what it printed.
    """
    node, packages = installed.node(), installed.node_packages()
    with tempfile.TemporaryDirectory() as scratch:
        asked = Path(scratch) / "question.json"
        asked.write_text(json.dumps(question), encoding="utf-8")
        done = proc.run(
            [node, "--import", installed.NODE / "packages.mjs", installed.NODE / script, asked],
            log=Path(scratch) / "log",
            env={"GGUF_FLEET_NODE_PACKAGES": str(packages)},
            timeout_s=_ANSWERS_WITHIN_S,
        )
    return json.loads(done.stdout)


def evaluate(questions: Sequence[Mapping[str, Any]]) -> list[Any]:
    """
    Evaluate expressions as GitHub does.

    Args:
        questions: For each `expression` (what stands between `${{` and `}}`), `condition` (it is an
            `if:`), `context` (name of a context to its value) and `status` (success, failure,
            cancelled: of what ran before).

    Returns:
        For each its value as plain JSON, a boolean for a condition, or the text of the error as
        an `ExpressionError`.

    Raises:
        MissingError: There is no Node, or its packages cannot be had.
        ToolError: The script failed.
    """
    answers = ask("expressions.mjs", list(questions))
    return [
        ExpressionError(answer["error"]) if "error" in answer else answer["value"]
        for answer in answers
    ]


class ExpressionError(Exception):
    """An expression that GitHub cannot evaluate."""
