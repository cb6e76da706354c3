"""Answers that loop or never end are found, what people repeat is not, and f16 is the measure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sample

from pipelines import convert, declaration, degenerate, fetch, hashing, params, records
from pipelines.degenerate import is_degenerate, is_loop, sign_test, unique_share
from pipelines.layout import Layout
from pipelines.load import generator, plan
from pipelines.serving import engine, modelfile, server

if TYPE_CHECKING:
    from pipelines.load.dialects import Answer
    from pipelines.load_records import ErrorClass
    from pipelines.toolchain import Toolchain

ROOT = Path(__file__).resolve().parent.parent

# What the embedded model really wrote under another model's template, and what larger ones are
# known to write after too hard a quantization.
LOOPS = {
    "a character": "\n    </////////////////////////////////////////////",
    "a word": "The answer is the the the the the the the the the the the",
    "numbers": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10",
    "a sentence, cut": "I'm happy to help. " + "The capital of France is Paris. " * 5 + "The capi",
    "paragraphs": "Sure!\n\n" + "First, open the file. Then read it.\n\n" * 6,
    "chinese": "好的。" + "我们可以这样做。" * 12,
    "a counter": " ".join(f"Step {i}: read the file and write the file again." for i in range(20)),
}
LEGITIMATE = {
    "a sentence": "The capital of France is Paris.",
    "a laugh": "Ha ha ha!",
    "counting": ", ".join(map(str, range(1, 40))),
    "a table": "| a | b | c | d |\n|---|---|---|---|\n| 1 | 2 | 3 | 4 |\n| 5 | 6 | 7 | 8 |\n",
    "a list": "\n".join(
        f"- {name} is the capital of {land}."
        for name, land in (
            *(("Paris", "France"), ("Berlin", "Germany"), ("Rome", "Italy"), ("Oslo", "Norway")),
            *(("Madrid", "Spain"), ("Lisbon", "Portugal"), ("Vienna", "Austria")),
            *(("Athens", "Greece"), ("Dublin", "Ireland"), ("Warsaw", "Poland")),
        )
    ),
    "a song": (
        "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\n"
        "Life is but a dream.\n"
    ),
    "a poem with a refrain": (
        "The woods are lovely, dark and deep,\nBut I have promises to keep,\n"
        "And miles to go before I sleep,\nAnd miles to go before I sleep.\n"
    ),
    "code": (
        "def test_add() -> None:\n    assert add(1, 2) == 3\n    assert add(2, 3) == 5\n"
        "    assert add(0, 0) == 0\n    assert add(-1, 1) == 0\n    assert add(10, 5) == 15\n\n\n"
        "if (a) {\n    if (b) {\n        if (c) {\n            run();\n        }\n    }\n}\n"
    ),
    "a ruler": "Results\n=======\n\nThe first run took 3 s.\nThe second run took 4 s.\n",
    "json": '[{"id": 1, "ok": true}, {"id": 2, "ok": true}, {"id": 3, "ok": false}]',
}


@dataclass(frozen=True)
class Said:
    """An answer as the load generator gives it."""

    text: str = "The capital of France is Paris."
    done_reason: str = "stop"
    output_tokens: int | None = 17
    error: ErrorClass | None = None


GOOD = Said()
LOOP = Said(text=LOOPS["a character"], done_reason="length", output_tokens=48)


@pytest.mark.parametrize("name", LOOPS)
def test_a_text_that_repeats_itself_is_a_loop(name: str) -> None:
    """One character, one word, one sentence or one paragraph for ever, cut anywhere, counted."""
    assert is_loop(LOOPS[name])
    assert is_degenerate(LOOPS[name], "length", 64) == "loop"


@pytest.mark.parametrize("name", LEGITIMATE)
def test_lists_songs_code_and_tables_may_repeat_themselves(name: str) -> None:
    """What people write is no loop, though parts of it recur."""
    assert not is_loop(LEGITIMATE[name])
    assert is_degenerate(LEGITIMATE[name], "stop", 64) is None


def test_no_page_of_documentation_is_a_loop() -> None:
    """Some 1,100 pieces of real prose, lists and code: the rules find nothing in text by people."""
    pieces = []
    for name in ("calibration.txt", "evaluation.txt"):
        text = (sample.of("corpora") / name).read_text(encoding="utf-8")
        pieces += [text[at : at + 600] for at in range(0, len(text) - 600, 211)]

    assert len(pieces) > 1000
    assert [piece for piece in pieces if is_loop(piece)] == []


def test_a_loop_after_a_long_good_start_is_a_loop_from_30_percent_on() -> None:
    """A few equal lines at the end of a long text are none, a third of it is."""
    start = LEGITIMATE["a list"]

    assert not is_loop(start + "\nDone." * 5)
    assert is_loop(start + "\nDone." * (len(start) // 10))


def test_the_share_of_different_sequences_says_nothing_of_short_texts() -> None:
    """Ten words that occur twice are an echo, not evidence."""
    assert unique_share("again and again and again and again") == 1.0


@pytest.mark.parametrize(
    ("text", "done_reason", "tokens", "kind"),
    [
        ("", "stop", 1, "empty"),
        (" \n\t", "length", 64, "empty"),
        (".", "stop", 2, "one_token"),
        ("The text goes on and on without", "length", 64, "no_end"),
        ("The text goes on and on without", "", 64, "no_end"),
        ("The text ends where the server does not say why.", "", 20, None),
        ("Yes.", "stop", 3, None),
        ("Yes.", "stop", None, None),
    ],
)
def test_every_kind_has_its_name(
    text: str, done_reason: str, tokens: int | None, kind: str | None
) -> None:
    """Empty before one token before a loop before no end."""
    assert is_degenerate(text, done_reason, tokens, limit_tokens=64) == kind


def test_the_sign_test_is_that_of_a_fair_coin() -> None:
    """Five of five heads happen once in 32 times, and no throw says nothing."""
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(4, 1) == 6 / 32
    assert sign_test(0, 0) == 1


def test_a_quant_that_loops_where_f16_does_not_fails() -> None:
    """The sentence says on how many prompts, with what limit, and that it is no chance."""
    judged = degenerate.compare([LOOP] * 8 + [GOOD] * 16, [GOOD] * 24, 0.1)

    assert judged.outcome == "FAIL"
    assert judged.excess == pytest.approx(8 / 24)
    assert (judged.degenerate_count, judged.f16_degenerate_count) == (8, 0)
    assert judged.kinds == {"loop": 8}
    assert "8 in a loop" in judged.sentence
    assert "8 worse than f16's and 0 better" in judged.sentence


def test_answers_as_bad_as_those_of_f16_pass() -> None:
    """A small model that is cut by the limit in both precisions is not worse for being smaller."""
    cut = Said(done_reason="length", output_tokens=64)

    judged = degenerate.compare([cut] * 20 + [LOOP] * 4, [cut] * 20 + [LOOP] * 4, 0.1)

    assert judged.outcome == "PASS"
    assert judged.excess == 0
    assert judged.degenerate_count == judged.f16_degenerate_count == 24


def test_a_loop_is_seen_where_the_f16_answer_was_only_cut() -> None:
    """With a small limit of tokens most good answers have no end, and must not hide broken ones."""
    cut = Said(done_reason="length", output_tokens=64)

    judged = degenerate.compare([LOOP] * 12 + [cut] * 12, [cut] * 24, 0.1)

    assert judged.outcome == "FAIL"
    assert judged.excess == 0.5


def test_answers_that_just_grew_longer_or_shorter_than_the_limit_cancel() -> None:
    """A model that says the same in other words is cut here and there, in both directions."""
    cut = Said(done_reason="length", output_tokens=64)

    judged = degenerate.compare(
        [cut] * 6 + [GOOD] * 6 + [cut] * 12, [GOOD] * 6 + [cut] * 6 + [cut] * 12, 0.1
    )

    assert (judged.outcome, judged.excess) == ("PASS", 0)


def test_a_few_more_than_allowed_are_inconclusive_and_more_prompts_decide() -> None:
    """Three of 24 are above 10 %, and chance does that once in eight times."""
    judged = degenerate.compare([LOOP] * 3 + [GOOD] * 21, [GOOD] * 24, 0.1)

    assert judged.outcome == "INCONCLUSIVE"
    assert "degenerate_prompts" in judged.sentence


def test_without_f16_nothing_is_judged() -> None:
    """A host that cannot hold f16 has nothing to compare with, and the counts are still there."""
    judged = degenerate.compare([LOOP] * 24, None, 0.1)

    assert judged.outcome == "INCONCLUSIVE"
    assert (judged.f16_degenerate_count, judged.excess) == (None, None)
    assert judged.degenerate_count == 24


def test_a_quant_without_f16_beside_it_passes_if_its_own_share_keeps_the_limit() -> None:
    """Nothing can exceed f16 by more than it has itself; answers that were cut off do not count."""
    cut = Said(done_reason="length", output_tokens=48)
    answers = [LOOP] * 2 + [cut] * 10 + [GOOD] * 12
    judged = degenerate.compare(answers, None, 0.1)

    assert (judged.outcome, judged.excess, judged.f16_degenerate_count) == ("PASS", None, None)
    assert "2 of 24 are more than cut off" in judged.sentence


def test_ollamas_repeat_guard_and_an_empty_answer_count_as_degenerate() -> None:
    """Both come as failed requests; here they are what a broken quant looks like."""
    guarded, empty = Said(error="loop"), Said(text="", error="empty_output")

    judged = degenerate.compare([guarded] * 6 + [empty] * 6, [GOOD] * 12, 0.1)

    assert judged.outcome == "FAIL"
    assert judged.kinds == {"empty": 6, "loop": 6}


def test_a_request_that_failed_otherwise_is_no_answer() -> None:
    """A server that is down says nothing of the text; with most of it missing nothing is judged."""
    down = Said(text="", error="connect")

    few = degenerate.compare([down] * 2 + [GOOD] * 22, [GOOD] * 24, 0.1)
    many = degenerate.compare([down] * 20 + [GOOD] * 4, [GOOD] * 24, 0.1)

    assert (few.outcome, few.degenerate_count) == ("PASS", 0)
    assert many.outcome == "INCONCLUSIVE"
    assert "only 4 of 24" in many.sentence


def test_answers_to_different_prompts_cannot_be_compared() -> None:
    """Pairs are pairs: a missing answer must not shift the others."""
    with pytest.raises(ValueError, match="argument"):
        degenerate.compare([GOOD] * 3, [GOOD] * 4, 0.1)


# --- a real model in a real Ollama ------------------------------------------------------------

MODEL = "tiny-llama"
QUESTIONS = (
    *(f"What is {left} + {right}?" for left, right in ((1, 2), (3, 4), (7, 5), (9, 9))),
    *(f"Count to {last}." for last in range(3, 9)),
    *(f"What is {thing}?" for thing in ("a list", "a loop", "a cache", "a server", "a test")),
    *("Who are you?", "Thank you!", "Hello!", "List two animals.", "Repeat: river"),
)
CHATML = (
    '# version: 1\nFROM x\nTEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}\n'
    '{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"""\n'
)


def greedy(host: server.Host, path: Path, text: str, log: Path) -> list[Answer]:
    """Let a file answer the questions without chance, behind a Modelfile."""
    file = server.GgufFile(
        type="F16", path=path, sha256=hashing.digest(path).sha256, modelfile=modelfile.parse(text)
    )
    with host.load(file) as loaded:
        prompts = [
            plan.Prompt(messages=({"role": "user", "content": question},)) for question in QUESTIONS
        ]
        planned = plan.closed(
            "greedy", concurrency=1, prompts=prompts, warm_up_requests=0, max_run_s=120, seed=1
        )
        target = plan.Target(
            url=loaded.url, api=loaded.api, model=loaded.name, generate_tokens=64, timeout_s=60,
            temperature=0.0, seed=1, context_tokens=512,
        )  # fmt: skip
        return list(generator.run(planned, target, log=log).answers)


@pytest.mark.toolchain
def test_a_broken_template_is_seen_in_the_answers_of_a_real_model(
    tools: Toolchain, tmp_path: Path
) -> None:
    """The model ends its answers; under another one's template it loops, and that is no chance."""
    root = tmp_path / "fork"
    sample.take(root, "examples", "corpora", "params.yaml")
    at, log = Layout(root), tmp_path / "log"
    declared = declaration.load(at.params)
    records.write(
        at.model_record("fetch", MODEL), fetch.run(params.fetch_slice(declared, MODEL), at)
    )
    at.toolchain.write_text(json.dumps(tools.manifest))
    convert.run(params.convert_slice(declared, MODEL), at)
    settings = server.Settings(
        context_tokens=512, parallel=1, threads=1, gpu_layers="all", kv_type="f16",
        flash_attention=True, load_timeout_s=120.0,
    )  # fmt: skip
    found = engine.find(params.Serving(engine="ollama"), tools, log=log)

    with server.open_host(found, settings, model=MODEL, at=at, log=log) as host:
        right = greedy(host, at.f16(MODEL), "# version: 1\nFROM x\n", log)
        broken = greedy(host, at.f16(MODEL), CHATML, log)

    assert degenerate.compare(right, right, 0.1).outcome == "PASS"
    judged = degenerate.compare(broken, right, 0.1)
    assert judged.outcome == "FAIL", judged
    assert judged.f16_degenerate_count is not None
    assert judged.f16_degenerate_count <= 4
    assert set(judged.kinds) & {"loop", "no_end"}
