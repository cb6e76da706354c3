"""The corpora are what their manifest says, and none leaks into another."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sample
from ruamel.yaml import YAML

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Fleet = Callable[..., subprocess.CompletedProcess[str]]

CORPORA = sample.of("corpora")
MIN_SHARED_PARAGRAPH_CHARS = 40


def read_yaml(name: str) -> Any:
    """Parse a YAML file of the corpora folder."""
    return YAML(typ="safe").load((CORPORA / name).read_text(encoding="utf-8"))


def manifest() -> dict[str, dict[str, str]]:
    """Entries of corpora.yaml by path."""
    return {entry["path"]: entry for entry in read_yaml("corpora.yaml")["files"]}


def long_paragraphs(name: str) -> set[str]:
    """Paragraphs of a text with blanks collapsed, without the short ones any text may repeat."""
    text = (CORPORA / name).read_text(encoding="utf-8")
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return {text for text in paragraphs if len(text) >= MIN_SHARED_PARAGRAPH_CHARS}


@pytest.mark.parametrize(
    "name",
    ["calibration.txt", "evaluation.txt", "prompts.yaml", "evals/technical-english.jsonl"],
)
def test_every_corpus_file_has_the_bytes_its_manifest_states(name: str) -> None:
    """A changed byte is a different corpus, so its digest is pinned."""
    digest = hashlib.sha256((CORPORA / name).read_bytes()).hexdigest()

    assert digest == manifest()[name]["sha256"]


def test_the_manifest_names_every_corpus_file_with_licence_and_source() -> None:
    """No file in the folder is of unknown origin."""
    explained = {"README.md", "corpora.yaml", ".gitattributes"}
    names = {
        path.relative_to(CORPORA).as_posix()
        for path in CORPORA.rglob("*")
        if path.is_file() and not {"LICENSES", "__pycache__"} & set(path.parts)
    }
    scripts = {name for name in names if name.endswith(".py")}

    assert names - explained - scripts == set(manifest())
    for entry in manifest().values():
        assert entry["license"]
        assert entry["source"]


def test_the_readme_states_the_digest_and_size_of_every_corpus_file() -> None:
    """People and programs read the same manifest."""
    readme = (CORPORA / "README.md").read_text(encoding="utf-8")

    for name, entry in manifest().items():
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert entry["sha256"] in row
        assert f" {(CORPORA / name).stat().st_size:,} " in row


def test_the_set_of_tasks_is_what_its_script_makes() -> None:
    """Nobody edited an item by hand, so none was put in or left out for what a model answers."""
    script = sample.of("examples/technical_english.py")
    made = subprocess.run([sys.executable, script], check=True, capture_output=True).stdout

    assert made == (CORPORA / "evals/technical-english.jsonl").read_bytes()


def test_a_text_is_renewed_as_the_readme_says(fleet: Fleet, checkout: Path) -> None:
    """`fleet check` refuses other bytes and prints the line that params.yaml then needs."""
    readme = " ".join((CORPORA / "README.md").read_text(encoding="utf-8").split())
    text, params = checkout / "corpora/evaluation.txt", checkout / "params.yaml"
    before = manifest()["evaluation.txt"]["sha256"]
    text.write_text(text.read_text(encoding="utf-8") + "One more line.\n", encoding="utf-8")

    refused = fleet("check", cwd=checkout)
    told = re.search(r"write: sha256: ([0-9a-f]{64})", refused.stderr)
    assert told is not None
    params.write_text(params.read_text().replace(before, told[1]))
    accepted = fleet("check", cwd=checkout)

    assert (refused.returncode, accepted.returncode) == (2, 0), accepted.stderr
    assert told[1] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert "`params.yaml` carries the sha256" in readme
    assert "`write: sha256: ...`" in readme


def test_every_source_project_is_redistributed_with_its_licence_text() -> None:
    """BSD and MIT ask that their notice travels with the text."""
    sources = " ".join(entry["source"] for entry in manifest().values())
    projects = set(re.findall(r"(\w+) \d+\.\d+", sources))

    assert {path.stem for path in (CORPORA / "LICENSES").glob("*.txt")} == projects
    for path in (CORPORA / "LICENSES").glob("*.txt"):
        assert "Copyright" in path.read_text(encoding="utf-8")


def test_calibration_and_evaluation_share_no_paragraph() -> None:
    """An importance matrix never saw the text its quant is judged on."""
    shared = long_paragraphs("calibration.txt") & long_paragraphs("evaluation.txt")

    assert long_paragraphs("calibration.txt")
    assert not shared


@pytest.mark.parametrize("name", ["calibration.txt", "evaluation.txt"])
def test_the_texts_hold_no_control_tokens_addresses_or_machine_paths(name: str) -> None:
    """A tokenizer that parses special tokens reads the texts like one that does not."""
    text = (CORPORA / name).read_text(encoding="utf-8")

    assert not re.findall(r"<\|\w+\|>|</?s>|\[INST\]|https?://\S+|/(?:home|Users)/\S+", text)


def test_prompts_are_conversations_that_end_with_the_user_or_are_gone_on_with() -> None:
    """Each conversation can be rendered for an answer and sent to a server."""
    prompts = read_yaml("prompts.yaml")
    conversations = prompts["conversations"]

    assert prompts["version"] == 2
    assert len({conversation["id"] for conversation in conversations}) == len(conversations)
    for conversation in conversations:
        messages = conversation["messages"]
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == [("user", "assistant")[index % 2] for index in range(len(turns))]
        assert turns[-1] == ("assistant" if "prefill" in conversation.get("needs", []) else "user")
        assert all(isinstance(message["content"], str) for message in messages)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("an empty system text", r"^$"),
        ("text outside Latin-1", r"[^\x00-\xff]"),
        ("a character above the basic multilingual plane", r"[\U00010000-\U0010ffff]"),
        ("code", r"def \w+\("),
        ("control tokens typed by a user", r"<\|end\|>"),
        ("blanks at both ends", r"(?s)^ .* $"),
        ("a long text", r"(?s)^.{800,}$"),
    ],
)
def test_prompts_cover_what_chat_templates_get_wrong(kind: str, pattern: str) -> None:
    """Every difficult kind of message is in the set at least once."""
    contents = [
        message["content"]
        for conversation in read_yaml("prompts.yaml")["conversations"]
        for message in conversation["messages"]
    ]

    assert any(re.search(pattern, content) for content in contents), f"no prompt with {kind}"
