r"""
The adversarial corpus: strings on which two tokenizers of one vocabulary are likely to differ.

Most is the same for every model: each general category of Unicode, combining marks in both normal
forms, runs of blanks, digits, contractions, code, scripts, what only looks like text. The rest is
made of the model: each added token, alone, glued to letters and behind blanks, and a sample of its
own vocabulary. Equal arguments give equal strings on every machine: characters come from Unicode 3.2,
which Python carries unchanged (`unicodedata.ucd_3_2_0`) and whose characters the tables of every
library have had for twenty years, so that the age of a table is not what differs.

The categories are groups for people: a finding names one.
"""

# Strange characters are what this file is made of, its lists are read better dense, and its random
# numbers are to be the same for ever.
# ruff: noqa: E501, RUF001, S311

from __future__ import annotations

import hashlib
import random
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# Raised with every change of the strings: a result names it.
VERSION: Final = 1
_SEED: Final = 20260101
_PER_GENERAL_CATEGORY: Final = 24
_MAX_ADDED_TOKENS: Final = 400
_SAMPLED_TOKENS: Final = 600
LONG_LINE_BYTES: Final = 1_000_000
_LONG_WORD_CHARACTERS: Final = 2_000

_UNICODE = unicodedata.ucd_3_2_0
# Half a surrogate pair is no character; it cannot be written in UTF-8.
_SURROGATES: Final = "Cs"


class Case(NamedTuple):
    """One string, the group that it belongs to, and what it is called in a finding."""

    id: str
    category: str
    text: str


def fixed() -> tuple[Case, ...]:
    """Return the strings that are the same for every model."""
    return _numbered(_fixed())


def of_model(
    added: Sequence[str], tokens_count: int, text_of: Callable[[int], str]
) -> tuple[Case, ...]:
    """
    Return the strings that are made of a model.

    Args:
        added: Texts of its added tokens in the order of their ids. Of more than 400 (some models
            reserve thousands that nobody uses) the first and last 200.
        tokens_count: Tokens in its vocabulary, of which 600 are taken.
        text_of: Gives the text of a token by its id, as people read it.
    """
    return _numbered(_of_model(added, tokens_count, text_of))


def digest(cases: Iterable[Case]) -> str:
    """Return the sha256 of the strings in their order."""
    hashed = hashlib.sha256()
    for case in cases:
        data = case.text.encode()
        hashed.update(len(data).to_bytes(8, "little") + data)
    return hashed.hexdigest()


def _numbered(found: Iterable[tuple[str, str]]) -> tuple[Case, ...]:
    """Drop what was there before, and call the rest `digits-0`, `digits-1`..."""
    counts: dict[str, int] = {}
    cases: dict[str, Case] = {}
    for category, text in found:
        if text not in cases:
            number = counts.get(category, 0)
            counts[category] = number + 1
            cases[text] = Case(f"{category}-{number}", category, text)
    return tuple(cases.values())


# --- the same for every model -----------------------------------------------------------------


def _fixed() -> Iterator[tuple[str, str]]:
    yield "empty", ""
    yield from (
        *((_of(name), text) for name, text in _general_categories()),
        *(("combining", text) for text in _combining()),
        *(("emoji", text) for text in _emoji()),
        *(("whitespace", text) for text in _whitespace()),
        *(("digits", text) for text in _digits()),
        *(("contractions", text) for text in _contractions()),
        *(("scripts", text) for text in _scripts()),
        *(("code", text) for text in _CODE),
        *(("web", text) for text in _WEB),
        *(("control-look-alikes", text) for text in _LOOK_ALIKES),
        *(("bytes", text) for text in _bytes()),
        *(("controls", text) for text in _controls()),
        *(("noncharacters", text) for text in _noncharacters()),
        *(("mixtures", text) for text in _mixtures()),
        *(("prose", text) for text in _PROSE),
        *(("long-words", text) for text in _long_words()),
        ("long-line", _long_line()),
    )


def _of(general_category: str) -> str:
    return f"unicode-{general_category}"


@cache
def _characters() -> dict[str, list[str]]:
    """Return the characters of each general category, in the order of their code points."""
    found: dict[str, list[str]] = {}
    # The planes in between are empty; noncharacters have a group of their own.
    for code in (*range(1, 0x30000), *range(0xE0000, 0xE0200)):
        category = _UNICODE.category(chr(code))
        if category not in {_SURROGATES, "Cc", "Cn", "Co"}:
            found.setdefault(category, []).append(chr(code))
    return found


def _general_categories() -> Iterator[tuple[str, str]]:
    """Yield some of each category: alone in a word, doubled between blanks, at both ends."""
    for category, characters in sorted(_characters().items()):
        step = max(1, len(characters) // _PER_GENERAL_CATEGORY)
        for character in characters[::step][:_PER_GENERAL_CATEGORY]:
            yield category, character
            yield category, f"a{character}b {character}{character} 1{character}2"
            yield category, f" {character}. \n{character}X"


_BASES: Final = "aAeEnNoOuUcCsSzZyYiIαωдй"
# Grave, acute, circumflex, tilde, diaeresis, ring, caron, dot below, cedilla, horn.
_MARKS: Final = (
    "\u0300", "\u0301", "\u0302", "\u0303", "\u0308", "\u030a", "\u030c", "\u0323", "\u0327", "\u031b",
)  # fmt: skip


def _combining() -> Iterator[str]:
    """Yield words in both normal forms, and marks where none belongs."""
    for base in _BASES:
        for mark in _MARKS[:: 1 if base in "aeou" else 3]:
            apart = f"{base}{mark}"
            joined = _UNICODE.normalize("NFC", apart)
            yield f"x{apart}y {apart}"
            yield f"x{joined}y {joined}"
    for word in (
        "Ångström",
        "naïve café",
        "Việt Nam",
        "Čeština",
        "가각힣",
        "が",
        "Ǆ",
        "ﬁn",
        "①②",
        "ｱﾊﾟｰﾄ",
    ):
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            yield _UNICODE.normalize(form, word)
    yield "\u0301"
    yield "\u0301 \u0301a"
    yield "a\u0301\u0323 a\u0323\u0301"
    yield "Z\u0351\u036b\u0343a\u0328\u034al\u0321\u0322g\u0489o"


def _emoji() -> Iterator[str]:
    yield from (
        "😀", "😀😀😀", "hi😀there", " 😀 ", "👩🏽‍💻", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🇪🇺", "🇩🇪🇫🇷", "🇪", "👍🏿", "👍🏻👍🏼👍🏽",
        "❤", "❤️", "☎︎", "1️⃣2️⃣", "#️⃣", "🤷‍♀️", "🧑‍🚀 in 🚀", "✈️", "🥲", "🫠", "🙂\u200d", "\ufe0f", "\u200d", "🏻",
        "I ❤️ NY 🗽!", "😀1😀a😀\n", "🀄🃏", "㊗️", "™️", "🧑🏿‍🤝‍🧑🏻",
    )  # fmt: skip


_BLANKS: Final = {
    "space": " ",
    "tab": "\t",
    "newline": "\n",
    "crlf": "\r\n",
    "return": "\r",
    "nbsp": "\u00a0",
    "line-separator": "\u2028",
    "ideographic": "\u3000",
    "thin": "\u2009",
    "zero-width": "\u200b",
    "next-line": "\u0085",
    "vertical-tab": "\v",
    "form-feed": "\f",
    "ogham": "\u1680",
}


def _whitespace() -> Iterator[str]:
    """Yield runs of each blank before, behind, between and alone, and pairs of different blanks."""
    for blank in _BLANKS.values():
        for length in (1, 2, 3, 4, 7, 8, 16, 33):
            run = blank * length
            yield run
            yield f"{run}a"
            yield f"a{run}"
            yield f"a{run}b"
            if length in {1, 2, 4}:
                yield f"a.{run}1"
                yield f"{run}."
    for one in _BLANKS.values():
        for other in _BLANKS.values():
            if one != other:
                yield f"a{one}{other}b {other}{other}{one}"
    yield from (
        "   \n   \n  x",
        "a \n",
        "a\n ",
        "\n\n\n\na",
        "if x:\n    y\n\n\n        z\t\t# c",
        " " * 120,
    )


def _digits() -> Iterator[str]:
    seeded = random.Random(_SEED)
    for length in range(1, 13):
        for _ in range(3):
            run = "".join(seeded.choice("0123456789") for _ in range(length))
            yield run
            yield f"a{run}b"
            yield f" {run} "
    yield from (
        "1,234,567.89", "1.234.567,89", "1 234 567", "1'234'567", "1_000_000", "3.14159265358979", "-42", "+7",
        "1e10", "6.02E23", "1.5e-3", "0x1F", "0b1010", "0o777", "1/2", "½ ¼ ¾", "²³¹ x² H₂O", "①②③", "Ⅳ ⅷ", "5%", "5 %",
        "$1,000.00", "€5", "10:45:30", "2026-01-31", "31/12/1999", "+49 (0)30 1234-5678", "192.168.0.1",
        "v1.2.3-rc.4", "1st 2nd 3rd 4th", "0000000", "00000001", "999999999999999999999999", "1" * 64,
        "٠١٢٣٤٥٦٧٨٩", "۰۱۲۳۴۵۶۷۸۹", "०१२३४५६७८९", "๐๑๒๓๔๕", "０１２３４５", "一二三四五", "𝟎𝟏𝟐𝟑", "12٣٤56", "1२3", "3 33 333 3333",
        "3.3.3.3", "1,2,3", "1, 2, 3", "1\n2\n3",
    )  # fmt: skip


def _contractions() -> Iterator[str]:
    for word in ("don", "I", "we", "they", "she", "you", "it", "DON", "WE", "O"):
        for quote in ("'", "\u2019"):
            for tail in ("t", "s", "re", "ve", "ll", "d", "m", "T", "S", "LL", "Ve", "x"):
                yield f"{word}{quote}{tail}"
    yield from (
        "I'm sure you're right, they've said he'd go; it's what she'll do.", "rock 'n' roll", "'tis", "y'all'd've",
        "'s 's", "''s", "' s", "dogs' tails", "l'été qu'il", "d'Artagnan", "O'Neill's", "'sa", "'ſ", "don't", " 'll",
    )  # fmt: skip


def _scripts() -> Iterator[str]:
    yield from (
        "今天天气很好，我们去公园吧。", "我在2024年买了3本书。", "繁體中文字", "東京都に住んでいます。", "カタカナとひらがな", "ﾊﾝｶｸ",
        "안녕하세요 세계", "ㅋㅋㅋ", "한국어2024년", "Привет, как дела?", "Ёлка ё", "Γειά σου Κόσμε", "ΑΒΓ ς σ",
        "مرحبا بالعالم", "كِتَابٌ", "اَلْعَرَبِيَّةُ", "سلام دنیا می‌خواهم", "שלום עולם", "שָׁלוֹם", "नमस्ते दुनिया", "क्षत्रिय",
        "বাংলা ভাষা", "ਪੰਜਾਬੀ", "ગુજરાતી", "தமிழ் மொழி", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "සිංහල", "สวัสดีชาวโลก", "ภาษาไทยไม่มีช่องว่าง",
        "ພາສາລາວ", "မြန်မာဘာသာ", "ភាសាខ្មែរ", "བོད་སྐད", "ქართული", "Հայերեն", "አማርኛ", "ᏣᎳᎩ", "ᐃᓄᒃᑎᑐᑦ", "ᚠᚢᚦ", "ⴰⵎⴰⵣⵉⵖ",
        "Tiếng Việt rất hay", "Türkçe İstanbul ılık", "Straße GROẞ", "Ĳssel", "Dž ǅ", "Œuvre æther", "ŁÓDŹ żółć",
        "Hello世界", "世界Hello", "abcабв", "price: 100円", "א1ב2", "a\u200eb\u200fc", "\u202eabc\u202c", "\u2066x\u2069",
        "𝒜𝓁𝑔𝑒𝒷𝓇𝒶", "𐍈𐌰", "𠀀𠮷野家", "ﷺ", "ﬀ ﬃ", "Ⓐⓑ", "ＦＵＬＬ　ｗｉｄｔｈ", "ʻOkina", "x̄ ŷ", "Ωμέγα", "Ω Å K",
    )  # fmt: skip


_CODE: Final = (
    "def f(x):\n    return x**2 if x >= 0 else -x\n",
    "class A(B):\n\tdef __init__(self, *args, **kwargs):\n\t\tsuper().__init__()\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c[i]; }",
    '#include <stdio.h>\nint main(void) {\n  printf("%d\\n", 42);\n  return 0;\n}\n',
    'fn main() -> Result<(), Box<dyn Error>> { println!("{:?}", x?); Ok(()) }',
    "const f = async (x) => ({...x, y: await g?.(x) ?? null});",
    "SELECT a.id, COUNT(*) FROM t AS a LEFT JOIN u ON a.id=u.id WHERE x<>'y' GROUP BY 1;",
    "<div class=\"a b\" id='c'>&nbsp;<br/><!-- no --></div>",
    '{"key": [1, 2.5, true, null], "nested": {"a\\"b": "c\\u0041"}}',
    '{\n  "a": 1,\n  "b": [\n    {}\n  ]\n}',
    "a: 1\nb:\n  - x\n  - y: |\n      text\n",
    "#!/bin/bash\nset -euo pipefail\nfor f in *.txt; do echo \"$f\" | sed 's/a/b/g' >> out; done",
    "\\frac{a}{b} + \\sum_{i=1}^{n} x_i^2 \\leq \\alpha",
    "x=1;y=2;z=x+y;//comment\n/* block */",
    "if (a && b || !c) { return a ? b : c; }",
    'git commit -m "fix: a/b#123" && git push --force-with-lease',
    "    indented\n\tby tab\n        more\n",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case PascalCase2Words HTTPServer",
    "a->b::c.d[e]<f>(g){h};",
    "!=== !== === == => -> <- <= >= << >> && || ?? ?. ... :: := ** // /* */ ++ --",
    "\"\"\"docstring\"\"\" '''x''' ``code`` ```py\nx\n```",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n",
    "# Title\n\n* item\n  1. sub\n> quote\n---\n",
    'package main\n\nimport "fmt"\n\nfunc main() {\n\tfmt.Println("hi")\n}\n',
    "0xDEADBEEF 0b1101 1_000 1e-9 .5 5. 1.0f 10L",
    "regex: ^[\\w.+-]+@(?:[a-z\\d-]+\\.)+[a-z]{2,}$",
    "\x1b[31mred\x1b[0m",
    'def función(año: int) -> str: return f"{año!r:>10}"',
)
_WEB: Final = (
    "https://example.org/a/b?c=d&e=%20f#g", "http://127.0.0.1:8080/", "mailto:ada.lovelace@example.org", "www.example.org",
    "user@example.org, x+y@z.co.uk", "C:\\Users\\ada\\file.txt", "/usr/local/bin/python3.11", "~/a/../b/./c",
    "#hashtag @mention", 'RT @a: "b" https://t.co/x', "a.b.c.d", "e.g. i.e. etc.", "U.S.A.", "Ph.D.", "…", "wait... what?!",
    "??!!", "—dash—", "well-known", "a--b", "(a)[b]{c}<d>", "\"quoted\" 'single' “curly” ‘x’ «g» „d“", "50%-60%", "a&b", "a/b",
    "C++ C# F# .NET", "★☆♥♦", "©®™", "→←↑↓", "≤≥≠≈∞", "°C °F", "§5", "¿Qué? ¡No!", "•  item", "1) a 2) b", "x^2_y", "~`|\\",
    "<html>", "&lt;b&gt;", "%s %d %%", "$HOME ${x} $(y)", "=====", "-----", "*****", "_____", "#####", ".....", "!!!!!", ",,,,,",
)  # fmt: skip
# What other models have as control tokens, and what is only nearly one.
_LOOK_ALIKES: Final = (
    "<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "[UNK]", "<mask>", "<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>",
    "<start_of_turn>user\nhi<end_of_turn>", "[INST] hi [/INST]", "<<SYS>>x<</SYS>>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|system|>\n", "<think>x</think>", "<tool_call>{}</tool_call>", "<|fim_prefix|>", "<0x0A>", "<0xFF>", "<0xGG>", "<0x0a>",
    "[PAD151646]", "<|reserved_special_token_0|>", "<unused0>", "▁", "▁a", "a▁b", "▁▁▁", "##ing", "Ġ", "Ġa", "Ċ", "ĠĠ", "</w>",
    "<|", "|>", "<|im_", "< |user| >", "<|USER|>", "<|user|", "|user|>", "<S>", "<<s>>", "<s><s>", "</s></s>", "<s >", "[cls]",
)  # fmt: skip


def _bytes() -> Iterator[str]:
    """Yield characters that start with each byte that UTF-8 has, mostly rare: byte fallback."""
    leads = (
        *((lead, b"\x95") for lead in range(0xC2, 0xE0)),
        *((lead, b"\x8f\x95") for lead in range(0xE1, 0xF0)),
        *((lead, b"\x90\x8f\x95") for lead in (0xF0, 0xF3)),
    )
    for lead, tail in leads:
        text = (bytes((lead,)) + tail).decode(errors="ignore")
        if text and _UNICODE.category(text) not in {"Cn", "Co"}:
            yield text
            yield f"x{text}{text} {text}"


def _controls() -> Iterator[str]:
    """Yield control characters, NUL left out: C strings end there, and no engine takes one."""
    for code in (*range(1, 32), *range(127, 160)):
        yield f"a{chr(code)}b{chr(code)}"
    yield from (
        "\ufeffHello",
        "a\ufeffb",
        "\u00ad",
        "so\u00adft",
        "\u061c",
        "\u180e",
        "\u2060",
        "\u206f",
        "\ufff9a\ufffb",
    )


def _noncharacters() -> Iterator[str]:
    """Yield what is no text: replacement, private use, noncharacters, neighbours of surrogates."""
    codes = (
        0xFFFD, 0xD7FF, 0xE000, 0xE123, 0xF8FF, 0xFFFE, 0xFFFF, 0xFDD0, 0xFDEF, 0x1FFFE, 0xF0000, 0xFFFFD, 0x100000,
        0x10FFFD, 0x10FFFF, 0x0378, 0x0530, 0x10000, 0x2FFFF, 0xE0001, 0xE007F,
    )  # fmt: skip
    for code in codes:
        yield f"a{chr(code)}b"
        yield f"{chr(code)}{chr(code)} {chr(code)}"


def _mixtures() -> Iterator[str]:
    """Yield words put together at random from all of the above."""
    seeded = random.Random(_SEED)
    characters = _characters()
    letters = [*characters["Ll"][:60], *characters["Lu"][:60], *characters["Lo"][::400]]
    pieces = (
        *letters, *"0123456789", *_BLANKS.values(), *_MARKS, *"'’\"-_.,;:!?()[]{}<>/\\|@#$%^&*+=~`", "don't", "123", "the ",
        " and", "ing", "世界", "😀", "👍🏿", "é", "ß", "\n\n", "    ", "'s", "'LL", "Straße", "мир",
    )  # fmt: skip
    for number in range(260):
        yield "".join(seeded.choice(pieces) for _ in range(3 + number % 24))


_PROSE: Final = (
    "Hello", " Hello", "Hello ", "hello world", "Hello World!", "HELLO WORLD", "hElLo wOrLd", "The quick brown fox jumps over the lazy dog.",
    "In 1969, humans first walked on the Moon; since then, 12 have.", "She said: “It’s fine.” — and left…", "a", "A", " a", "a ", "ab", "the", " the",
    "antidisestablishmentarianism", "supercalifragilisticexpialidocious", "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
    "Dear Sir/Madam,\n\nI am writing to you...\n\nYours,\nA. B.\n", "Ünïcödé ẃörds äre häřd.", "Donaudampfschifffahrtsgesellschaftskapitän",
    "El niño comió piñas en el jardín.", "Où est la bibliothèque ?", "Il pleut; l'homme s'en va.", "Zażółć gęślą jaźń.", "Příliš žluťoučký kůň.",
    "Być albo nie być.", "Съешь ещё этих мягких французских булок.", "Pchnąć w tę łódź jeża.", "いろはにほへと ちりぬるを", "千里之行，始于足下。",
    "동해물과 백두산이 마르고 닳도록", "इस दुनिया में सब कुछ है।", "نص حكيم له سر قاطع وذو شأن عظيم", "Θέλει αρετή και τόλμη η ελευθερία.",
)  # fmt: skip


def _long_words() -> Iterator[str]:
    for character in (
        "a",
        "é",
        "世",
        "ก",
        "1",
        "!",
        "=",
        "-",
        "ab",
        "Aa",
        "a1",
        "x ",
        "\n",
        "😀",
        " ",
    ):
        for length in (50, 300, _LONG_WORD_CHARACTERS):
            yield (character * length)[:length]
    seeded = random.Random(_SEED)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for length in (64, 300, _LONG_WORD_CHARACTERS):
        yield "".join(seeded.choice(letters) for _ in range(length))


def _long_line() -> str:
    """Return one line of 1,000,000 bytes, as logs and minified files have them."""
    seeded = random.Random(_SEED)
    words = " ".join(text for text in (*_PROSE, *_CODE, *_WEB) if text.isascii()).split()
    line: list[str] = []
    size_bytes = 0
    while size_bytes < LONG_LINE_BYTES:
        word = seeded.choice(words) if seeded.random() < 0.9 else str(seeded.randrange(10**6))  # noqa: PLR2004 - a tenth are numbers
        line.append(word)
        size_bytes += len(word) + 1
    return " ".join(line)[:LONG_LINE_BYTES]


# --- of the model -----------------------------------------------------------------------------


def _of_model(
    added: Sequence[str], tokens_count: int, text_of: Callable[[int], str]
) -> Iterator[tuple[str, str]]:
    half = _MAX_ADDED_TOKENS // 2
    used = added if len(added) <= _MAX_ADDED_TOKENS else [*added[:half], *added[-half:]]
    for text in used:
        yield "added-tokens", text
        yield "added-tokens", f"a{text}b"
        yield "added-tokens", f"{text}{text}"
        yield "added-tokens-and-blanks", f" {text} x"
        yield "added-tokens-and-blanks", f"1\n{text}\n  {text}\t"
        yield "added-tokens-cut", text[:-1]
        yield "added-tokens-cut", text[1:]
        yield "added-tokens-cut", text.upper()
    if used:
        yield "added-tokens", "".join(used[:64])
    seeded = random.Random(_SEED)
    sample = sorted(seeded.sample(range(tokens_count), min(_SAMPLED_TOKENS, tokens_count)))
    texts = [text_of(index) for index in sample]
    for text in texts:
        yield "vocabulary", text
        yield "vocabulary", f"{text}{seeded.choice(texts)}"
