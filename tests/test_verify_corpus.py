"""The adversarial corpus: large, strange, and the same on every machine."""

from __future__ import annotations

import unicodedata

from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import verify_corpus

CASES = verify_corpus.fixed()
TEXTS = {case.text for case in CASES}


def _of(category: str) -> list[str]:
    return [case.text for case in CASES if case.category == category]


def test_it_has_thousands_of_different_strings() -> None:
    """At least 2,000, none twice."""
    assert len(CASES) >= 2_000
    assert len(TEXTS) == len(CASES)
    assert len({case.id for case in CASES}) == len(CASES)


def test_it_is_the_same_on_every_machine_and_a_change_raises_the_version() -> None:
    """Two records are comparable if they name the same corpus."""
    known = {1: "8cbd933bb2c0541c83c2d4407a67b384152c9dc00067d8cf9682b11af4f1fcf0"}
    assert verify_corpus.digest(CASES) == known[verify_corpus.VERSION]


def test_every_general_category_of_unicode_that_is_text_is_in_it() -> None:
    """From letters to unassigned code points."""
    found = {unicodedata.category(character) for text in TEXTS for character in text}
    # Cs is half a surrogate pair, which UTF-8 cannot write.
    assert found >= {
        "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "Pc", "Pd", "Ps", "Pe",
        "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cn",
    }  # fmt: skip


def test_no_string_is_one_that_an_engine_could_not_be_sent() -> None:
    """No NUL, no half of a surrogate pair."""
    for text in TEXTS:
        assert "\0" not in text
        assert text.encode().decode() == text


def test_words_with_accents_are_in_it_in_both_normal_forms() -> None:
    """Composed and decomposed."""
    texts = _of("combining")
    split = [text for text in texts if unicodedata.normalize("NFC", text) != text]
    assert len(split) > 50
    assert sum(unicodedata.normalize("NFC", text) in TEXTS for text in split) > 50


def test_runs_of_digits_have_every_length_from_1_to_12() -> None:
    """Pre-tokenizers group them by three, one or not at all."""
    assert {len(text) for text in _of("digits") if text.isascii() and text.isdigit()} >= set(
        range(1, 13)
    )


def test_each_kind_of_blank_stands_in_front_behind_between_and_alone() -> None:
    """Where tokenizers differ most."""
    for blank in (" ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000"):
        assert {blank * 3, f"{blank * 3}a", f"a{blank * 3}", f"a{blank * 3}b"} <= TEXTS


def test_one_line_is_a_million_bytes_long() -> None:
    """As logs and minified files have them."""
    (line,) = _of("long-line")
    assert len(line.encode()) == verify_corpus.LONG_LINE_BYTES == 1_000_000
    assert "\n" not in line


def test_empty_text_zero_width_joiners_flags_and_byte_order_marks_are_in_it() -> None:
    """What users paste without seeing it."""
    assert "" in TEXTS
    for part in ("\u200d", "\U0001f1ea\U0001f1fa", "\ufeff", "\ufffd", "\ud7ff", "\ue000"):
        assert any(part in text for text in TEXTS)


def test_each_added_token_stands_alone_glued_behind_blanks_and_cut() -> None:
    """Of each token of the model."""
    texts = {
        case.text for case in verify_corpus.of_model(["<|end|>", "<think>"], 3, "abc".__getitem__)
    }
    assert {
        "<|end|>", "a<|end|>b", "<|end|><|end|>", " <|end|> x", "<|end|", "|end|>",
        "<|end|><think>",
    } <= texts  # fmt: skip
    assert {"a", "b", "c"} <= texts


def test_thousands_of_reserved_tokens_do_not_make_it_endless() -> None:
    """The first and the last are in it."""
    many = [f"<|reserved_{index}|>" for index in range(6_000)]
    cases = verify_corpus.of_model(many, 6_000, many.__getitem__)
    assert len(cases) < 5_000
    texts = {case.text for case in cases}
    assert {many[0], many[-1]} <= texts


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), max_size=6), st.integers(0, 2_000))
def test_what_is_made_of_a_model_is_the_same_each_time(added: list[str], count: int) -> None:
    """Whatever its tokens are."""

    def made() -> tuple[verify_corpus.Case, ...]:
        return verify_corpus.of_model(added, count, lambda index: f"t{index}")

    assert made() == made()
    assert len({case.text for case in made()}) == len(made())
