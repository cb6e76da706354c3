"""
actions/README.md, written from the actions themselves: `python -m checks.action_pages --write`.

One block for each action: what it does, the line that it types, how another repository uses it,
its inputs and outputs. `make check` says when the page is not what the actions say.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any, Final

from checks import files, installed
from pipelines import atomic, console

if TYPE_CHECKING:
    from collections.abc import Mapping

    from checks.files import Repository, Yaml

PAGE: Final = "actions/README.md"
REWRITE: Final = "python -m checks.action_pages --write"
_HEAD: Final = f"""\
# Composite actions

<!-- Written by `{REWRITE}` from each action.yml. -->

Each action types one `fleet` verb, which a person can type as well; its outputs and the summary of
the job are written by that verb. `setup` comes first in every job, after the checkout: it makes the
environment in which the others run. All of them work in the checkout of the job, on its
`params.yaml`; their code comes along with the action, so another repository can use them:

```yaml
- uses: actions/checkout@{{checkout}}
  with:
    persist-credentials: false
- uses: OWNER/gguf-fleet/actions/setup@SHA # a commit of 40 digits, never a branch
- uses: OWNER/gguf-fleet/actions/benchmark@SHA
  with:
    models: tiny-llama
```

| action | types | what it does |
| --- | --- | --- |
{{index}}
"""


def page(repository: Repository) -> str:
    """Return the text of actions/README.md."""
    actions = repository.actions.values()
    pin = repository.pins.data["actions/checkout"] if repository.pins else {}
    index = "\n".join(
        f"| [{action.name}](#{action.name}) | `{_typed(action)}` | {_first_sentence(action)} |"
        for action in actions
    )
    checkout = f"{pin.get('sha', 'SHA')} # {pin.get('version', '')}"
    head = _HEAD.replace("{checkout}", checkout).replace("{index}", index)
    return head + "".join(f"\n{_block(action)}" for action in actions)


def _block(action: Yaml) -> str:
    required = [name for name, known in _members(action, "inputs").items() if known.get("required")]
    uses = f"- uses: OWNER/gguf-fleet/actions/{action.name}@SHA\n"
    uses += "".join(["  with:\n", *(f"    {name}: …\n" for name in required)] if required else [])
    rows = [
        f"| `{name}` | {_cell(known['description'])} | {_default(known)} |"
        for name, known in _members(action, "inputs").items()
    ]
    outputs = [
        f"| `{name}` | {_cell(known['description'])} |"
        for name, known in _members(action, "outputs").items()
    ]
    text = f"## {action.name}\n\n{_cell(action.data['description'])}\n\n```yaml\n{uses}```\n"
    if rows:
        text += "\n| input | meaning | default |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    if outputs:
        text += "\n| output | meaning |\n| --- | --- |\n" + "\n".join(outputs) + "\n"
    return text


def _members(action: Yaml, section: str) -> Mapping[str, Any]:
    return action.data.get(section) or {}


def _default(known: Mapping[str, Any]) -> str:
    if known.get("required"):
        return "required"
    value = str(known.get("default", ""))
    return f"`{value}`" if value else "empty"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _first_sentence(action: Yaml) -> str:
    return _cell(action.data["description"]).split(". ")[0].removesuffix(".")


def _typed(action: Yaml) -> str:
    """Return the verb of its line, with the options that are always there."""
    line = next((step.run for step in action.runs if step.run), "")
    words = line.partition('/fleet" ')[2].split()
    fixed = [word for word in words if "$" not in word and word != "--"]
    return " ".join(["fleet", *fixed])


def main() -> int:
    """Write the page, or say that it is stale."""
    parser = argparse.ArgumentParser(description="Write actions/README.md from the actions.")
    parser.add_argument("--write", action="store_true", help="write it; without, only compare")
    write = parser.parse_args().write
    repository = files.read(installed.ROOT)
    path = repository.root / PAGE
    text = page(repository)
    if write:
        atomic.write_text(path, text)
    elif repository.text(PAGE) != text:
        console.error(f"{PAGE} is not what the actions say. Next: {REWRITE}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
