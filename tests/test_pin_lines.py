"""Single values of params.yaml are exchanged, and not a byte beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sample
from bump_factory import MODEL, NEW, OLD, OTHER, PARAMS

from pipelines import declaration, pin_lines
from pipelines.errors import ParamsError

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.pin_lines import Place, Value

REVISION: Place = ("models", MODEL, "revision")
DIGITS = "1234567890" * 4


@pytest.mark.parametrize(
    ("before", "edits", "after"),
    [
        pytest.param(f"{OLD}  # pinned", {REVISION: NEW}, f"{NEW}  # pinned", id="comment"),
        pytest.param(
            f"revision: {'d' * 40},",
            {("models", OTHER, "revision"): NEW},
            f"revision: {NEW},",
            id="flow",
        ),
        # Without quotes it would be a number.
        pytest.param(f"{OLD}  #", {REVISION: DIGITS}, f'"{DIGITS}"  #', id="digits"),
        pytest.param(
            f"{{llama_cpp_python: 0.3.36, sha256: {'a' * 64}}}",
            {
                ("toolchain", "llama_cpp_python"): "0.3.100",
                ("toolchain", "sha256"): "c" * 64,
                ("toolchain", "recipe"): 2,
            },
            f"{{llama_cpp_python: 0.3.100, recipe: 2, sha256: {'c' * 64}}}",
            id="several of one line, one of them new",
        ),
        pytest.param(
            "context_tokens:   512\n",
            {REVISION: NEW, ("models", MODEL, "context_tokens"): 2048},
            "context_tokens:   2048\n",
            id="two lines",
        ),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_only_the_values_change(
    before: str, edits: dict[Place, Value], after: str, line_end: str, tmp_path: Path
) -> None:
    """Comments, order, spaces, the way it is written and the line ends stay."""
    assert before in PARAMS
    path = tmp_path / "params.yaml"
    path.write_bytes(PARAMS.replace("\n", line_end).encode())
    wanted = PARAMS.replace(before, after)
    if REVISION in edits:
        wanted = wanted.replace(OLD, str(edits[REVISION]))

    assert pin_lines.write(path, edits)

    assert path.read_bytes().decode() == wanted.replace("\n", line_end)
    assert pin_lines.values(path, edits) == edits
    assert not pin_lines.write(path, edits)  # nothing left to do


def test_quotes_stay_quotes() -> None:
    """A value in quotes of either kind keeps them."""
    for quote in "'\"":
        text = PARAMS.replace(OLD, f"{quote}{OLD}{quote}")

        assert pin_lines.changed(text.encode(), {REVISION: NEW}).decode() == text.replace(OLD, NEW)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("models", "gone", "revision"), NEW, "has no models.gone.revision"),
        (REVISION, "main", "cannot be changed"),
        (("serving", "ollama"), "0.33.1", "cannot be changed"),  # there is no `serving:` at all
    ],
)
def test_what_cannot_be_written_leaves_the_file_as_it_is(
    place: Place, value: str, said: str, tmp_path: Path
) -> None:
    """A place that is not there, a value that is none: an error that says what to write."""
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)

    with pytest.raises(ParamsError, match=said):
        pin_lines.write(path, {place: value})

    assert path.read_text() == PARAMS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("before", "after"),
    [("revision: ", "revision:\t"), ("revision: ", "revision: >-\n      "), ("models:", "model:")],
)
def test_what_another_place_has_wrong_names_no_file_of_ours(before: str, after: str) -> None:
    """A tab, which only one of two parsers takes; a folded value; a key that is none."""
    text = PARAMS.replace(before, after, 1)

    with pytest.raises(ParamsError) as error:
        pin_lines.changed(text.encode(), {REVISION: NEW})

    assert "params.yaml" in error.value.message
    assert "/" not in error.value.message


def test_the_pins_of_the_sample_can_be_changed(tmp_path: Path) -> None:
    """Its own params.yaml is written in a way in which a bump changes one line for each pin."""
    path = tmp_path / "params.yaml"
    before = sample.of("params.yaml").read_bytes()
    path.write_bytes(before)
    declared = declaration.load(path)
    edits: dict[Place, Value] = {("models", name, "revision"): NEW for name in declared.models}
    edits[("toolchain", "sha256")] = "c" * 64

    pin_lines.write(path, edits)

    lines = zip(before.splitlines(), path.read_bytes().splitlines(), strict=True)
    assert sum(was != now for was, now in lines) == len(edits)
