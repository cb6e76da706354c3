"""actions/README.md: what a caller has to know of each action."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

from pipelines import action_pages

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_names_every_input_and_output_of_every_action() -> None:
    """`make check` holds the page against the files; here nothing of the files is left out."""
    page = action_pages.page(ROOT)

    for path in (ROOT / "actions").glob("*/action.yml"):
        action = YAML(typ="safe").load(path)
        block = page.split(f"\n## {path.parent.name}\n")[1].split("\n## ")[0]
        for name in [*(action.get("inputs") or {}), *(action.get("outputs") or {})]:
            assert f"| `{name}` |" in block
        for name, field in (action.get("inputs") or {}).items():
            row = next(line for line in block.splitlines() if line.startswith(f"| `{name}` |"))
            assert ("required" in row.split("|")[2]) is bool(field.get("required"))


def test_a_new_action_stands_at_the_end_of_the_page(tmp_path: Path) -> None:
    """Nobody has to be told of it by hand."""
    for name in ("setup", "anew"):
        (tmp_path / "actions" / name).mkdir(parents=True)
        text = f"name: {name}\ndescription: Does\n  it.\nruns: {{using: composite, steps: []}}\n"
        (tmp_path / "actions" / name / "action.yml").write_text(text)

    page = action_pages.page(tmp_path)

    assert page.endswith("\n## anew\n\nDoes it.\n")
    assert page.index("## setup") < page.index("## anew")
