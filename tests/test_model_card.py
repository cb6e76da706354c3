"""The card of a repository on the Hub: what is in it, and what strangers cannot make of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hub_writable
import pytest
import release_factory as factory
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import model_card
from pipelines.release_records import (
    ReleasedHost,
    ReleaseLicense,
    ReleaseSource,
    ReleaseWaiver,
)

if TYPE_CHECKING:
    from pipelines.release_records import Release

GOLDEN = Path(__file__).parent / "data/model_card.md"
REPO = "acme/tiny-llama-GGUF"
ID = "c0ffee" * 10 + "c0ff"


def release_of(directory: Path, **changes: Any) -> Release:
    """Return a release of a model on the Hub, with an importance matrix, and what differs."""
    made = factory.composed(directory / "files").release
    corpus = factory.sha256(b"calibration")
    quants = (
        made.quants[0],
        made.quants[1].model_copy(
            update={"imatrix_sha256": factory.sha256(b"i"), "imatrix_corpus_sha256": corpus}
        ),
    )
    source = ReleaseSource(
        source="hf:acme/Tiny-Llama", revision="a" * 40, architecture="LlamaForCausalLM",
        parameters_count=3_400_000,
    )  # fmt: skip
    return made.model_copy(update={"quants": quants, "source": source} | changes)


def parsed(card: str) -> tuple[dict[str, Any], str]:
    """Split a card as the Hub does; return metadata and body."""
    match = re.match(r"---\n(.*?\n)---\n(.*)", card, re.DOTALL)
    assert match is not None
    metadata = yaml.safe_load(match[1])
    assert isinstance(metadata, dict)
    return metadata, match[2]


def test_the_card_is_this_one(tmp_path: Path) -> None:
    """Every number with its unit, the hardware, the limits, the digests, the waiver."""
    waiver = ReleaseWaiver(
        gate="license", who="Ada", why="Legal has read the text.", until="2027-03-01"
    )
    card = model_card.render(release_of(tmp_path, waivers=(waiver,)), ID, REPO)

    # To renew it after a change that you have read: GOLDEN.write_text(card)
    assert card == GOLDEN.read_text(encoding="utf-8")


def test_equal_releases_have_equal_cards(tmp_path: Path) -> None:
    """No time, no host, no order of a set: a card is a function of the release."""
    first, second = release_of(tmp_path), release_of(tmp_path)

    assert model_card.render(first, ID, REPO) == model_card.render(second, ID, REPO)


def test_a_source_that_is_not_on_the_hub_is_no_base_model(tmp_path: Path) -> None:
    """`base_model` names a repository of the Hub or is not there."""
    source = release_of(tmp_path).source.model_copy(update={"source": "path:examples/tiny"})

    metadata, body = parsed(model_card.render(release_of(tmp_path, source=source), ID, REPO))

    assert "base_model" not in metadata
    assert "base_model_relation" not in metadata
    assert "huggingface.co/path" not in body


@pytest.mark.parametrize(
    ("id_", "expected"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("openrail++", {"license": "openrail++"}),
        (
            "acme-community",
            {"license": "other", "license_name": "acme-community", "license_link": "LICENSE"},
        ),
        ("other", {"license": "other", "license_name": "other", "license_link": "LICENSE"}),
    ],
)
def test_the_licence_is_carried_over(id_: str, expected: dict[str, str], tmp_path: Path) -> None:
    """The Hub's own word where it has one; else its name and the text that upstream ships."""
    made = release_of(tmp_path)
    licence = ReleaseLicense(id=id_, files=made.license.files)

    metadata, _ = parsed(model_card.render(release_of(tmp_path, license=licence), ID, REPO))

    assert {key: metadata[key] for key in metadata if key.startswith("license")} == expected


def test_a_licence_without_a_text_is_linked_at_the_pinned_revision(tmp_path: Path) -> None:
    """Upstream's card at the very commit says what it said."""
    made = release_of(tmp_path)
    files = tuple(file for file in made.files if file.role != "license")
    licence = ReleaseLicense(id="acme-community", files={})

    metadata, _ = parsed(
        model_card.render(release_of(tmp_path, license=licence, files=files), ID, REPO)
    )

    link = f"https://huggingface.co/acme/Tiny-Llama/blob/{'a' * 40}/README.md"
    assert metadata["license_link"] == link


def test_waivers_are_shown_before_anything_else(tmp_path: Path) -> None:
    """Who, why and until when: before a command that somebody may copy."""
    waiver = ReleaseWaiver(
        gate="hold", who="Ada", why="The second card is late", until="2027-03-01"
    )

    _, body = parsed(model_card.render(release_of(tmp_path, waivers=(waiver,)), ID, REPO))

    assert body.index("Waiver (hold)") < body.index("ollama pull")
    assert "The second card is late. Declared by Ada." in body


HOSTILE = (
    "a\n---\nlicense: mit\n", "<script>alert(1)</script>", "![x](http://evil.example/x.png)",
    "[x](javascript:alert(1))", "| a | b |", "`code`", "@everyone", "#1", "\x1b[31mred",
    "::error::x",
    "- list", "> quote", "<img src=http://evil.example/x>", "http://evil.example", "{{ 7 * 7 }}",
    "'\"\\", "!!python/object:x", "*bold* _it_ ~~no~~", "\u202egnp.exe", "<!-- ", "$x$",
    "yes", "null",
)  # fmt: skip
WORDS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(max_size=60),
    st.tuples(st.text(max_size=9), st.sampled_from(HOSTILE)).map("".join),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release that hostile words are put into."""
    return release_of(tmp_path_factory.mktemp("card"))


def hostile(base: Release, words: list[str]) -> Release:
    """Put text of strangers wherever a release holds text."""
    a, b, c, d, e, f, g, h = words
    quant = base.quants[0].model_copy(update={"sentence": a, "type": base.quants[0].type})
    return base.model_copy(
        update={
            "model": b,
            "license": ReleaseLicense(id=c, files={d: "0" * 64}),
            "source": base.source.model_copy(
                update={"source": f"hf:{e}", "architecture": f, "revision": g}
            ),
            "hosts": {h: ReleasedHost(verdict="PROMOTE", winner=a, sentence=b)},
            "machine": base.machine.model_copy(update={"cpu": c, "gpus": (d,)}),
            "gates": tuple(g_.model_copy(update={"host": e, "sentence": f}) for g_ in base.gates),
            "waivers": (ReleaseWaiver(gate="hold", who=g, why=h, until=a),),
            "tools": base.tools.model_copy(update={"engine_version": b, "modelfile": c}),
            "quants": (quant,),
            "objective": d,
            "choice_gates": {e: 0.5},
        }
    )


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, min_size=8, max_size=8))
def test_whatever_strangers_write_the_metadata_has_our_keys_alone(
    base: Release, words: list[str]
) -> None:
    """It parses, as the Hub parses it, to values that we put there; no key is smuggled in."""
    made = hostile(base, words)
    card = model_card.render(made, ID, REPO)

    metadata, body = parsed(card)

    assert set(metadata) <= set(model_card.KEYS)
    assert metadata == model_card.front_matter(made, REPO)
    assert metadata["library_name"] == "gguf"
    assert metadata["quantized_by"] == "acme"
    assert hub_writable.front_matter_problem(card) == ""
    assert not re.search(r"(?m)^---$", body)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.lists(WORDS, min_size=8, max_size=8))
def test_whatever_strangers_write_the_page_loads_nothing_and_calls_nobody(
    base: Release, words: list[str]
) -> None:
    """No HTML, no image, no link but upstream's, no mention, no line of their own."""
    _, body = parsed(model_card.render(hostile(base, words), ID, REPO))

    assert "<" not in body
    assert "![" not in body
    assert not re.search(r"@(?!\u200b)\w", body.replace("@cafe", "").replace(f"@{ID[:12]}", ""))
    for link in re.findall(r"\]\(([^)]*)\)", body):
        assert link.startswith("https://huggingface.co/")
    assert not re.search(r"https?://(?!huggingface\.co/)", body)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", body)
    # Lines begin as the template begins them.
    starts = ("# ", "## ", "|", "- ", "> **Waiver", "```", "ollama pull hf.co/", "fleet pull ")
    for line in body.splitlines():
        assert not line or line.startswith(starts) or line[0].isalpha(), line
