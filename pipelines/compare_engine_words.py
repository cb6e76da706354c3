"""
What engine.json says: sentences and the rows of its table, from its record alone.

Terminal, report and pull request show these very words; nothing here reads a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import compare_words, console, wording

if TYPE_CHECKING:
    from pipelines.compare_engine_records import (
        Cause,
        Departure,
        Effect,
        EngineAnswers,
        EngineRecord,
        EngineSpeed,
    )
    from pipelines.compare_records import Outcome, Side

# Nine columns: what a pull request shows without a scroll bar.
HEADS: Final = (
    "",
    "old GGUF, old engine",
    "old GGUF, new engine",
    "new GGUF, old engine",
    "new GGUF, new engine",
    "by the engine",
    "by the GGUF",
    "by both beyond each",
    "cause",
)
CAUSES: Final[dict[Cause, str]] = {
    "engine": "the engine",
    "model": "the GGUF",
    "both": "engine and GGUF",
    "interaction": "only both together",
    "neither": "neither",
    "cannot tell": "cannot tell",
}
_CAUSED: Final[dict[Cause, str]] = {
    "engine": "what changed in speed is due to the engine, not to the GGUF",
    "model": "what changed in speed is due to the GGUF, not to the engine",
    "both": "engine and GGUF both changed the speed",
    "interaction": "neither changed the speed by itself, but the new engine runs the new GGUF at "
    "another speed than the old one",
    "neither": "of neither the engine nor the GGUF a change in speed that matters is shown",
    "cannot tell": "which of the two changed the speed cannot be told",
}

# A tenth of what logits of 16 bits can tell from nothing.
_SMALLEST_NATS: Final = 1e-4
_CAUSED_BY_ENGINE: Final[dict[Cause, str]] = {
    "engine": "the GGUF is the same, so what changed in speed is due to the engine",
    "neither": "the GGUF is the same, and no change of its speed that matters is shown",
}


# --- numbers ----------------------------------------------------------------------------------


def engine(one: Side) -> str:
    """Name an engine: `llama.cpp 0c1e57098a3f`."""
    return f"llama.cpp {console.clean(one.llama_cpp_commit)[: compare_words.SHORT_CHARACTERS]}"


def change_of_engine(old: Side, new: Side) -> str:
    """Name the change of the engine: by commits, or by builds where the commit is the same."""
    short = compare_words.SHORT_CHARACTERS
    if old.llama_cpp_commit != new.llama_cpp_commit:
        return f"{engine(old)} → {console.clean(new.llama_cpp_commit)[:short]}"
    builds = f"{console.clean(old.toolchain_id)} → {console.clean(new.toolchain_id)}"
    return f"{engine(old)}, build {builds}"


def effect(one: Effect | None) -> str:
    """Write an effect with its interval; a dash of what was not measured."""
    return (
        wording.ABSENT if one is None else compare_words.interval(one.log_ratio, one.low, one.high)
    )


def test_name(one: EngineSpeed) -> str:
    """Name a test: `decode at 4,096`; a prefill of an empty context is just `prefill`."""
    if one.test == "prefill" and one.depth_tokens == 0:
        return "prefill"
    return f"{one.test} at {wording.tokens(one.depth_tokens)}"


def departure(one: Departure) -> str:
    """Say how far something answers otherwise: `divergence 0.02 nats [0.018, 0.022], ...`."""
    ratio = f"perplexity times {wording.number(one.ppl_ratio, 5)}"
    if one.kld_mean_nats is None or one.same_top is None:
        return ratio
    how_far = f"divergence {nats(one.kld_mean_nats)} nats"
    if max(one.kld_mean_nats, one.kld_high_nats or 0.0) >= _SMALLEST_NATS:
        how_far += f" [{nats(one.kld_low_nats)}, {nats(one.kld_high_nats)}]"
    same = f"the same first choice for {wording.percent(one.same_top, 4)} of the tokens"
    return f"{how_far}, {same}, {ratio}"


def nats(value: float | None) -> str:
    """Write a divergence; of one that is next to nothing only that: `below 0.0001`."""
    if value is None or value == 0 or value >= _SMALLEST_NATS:
        return wording.number(value)
    return f"below {wording.declared(_SMALLEST_NATS)}"


# --- sentences --------------------------------------------------------------------------------


def answers_sentence(outcome: Outcome, found: Departure, limit_nats: float) -> str:
    """Say whether the new engine answers as the old one, with the same file."""
    said, limit = departure(found), f"{wording.declared(limit_nats)} nats"
    if found.kld_mean_nats is None:
        told = (
            "as near as perplexities can tell, it answers as before"
            if outcome == "equal"
            else "whether it answers as before cannot be told"
        )
        return f"The logits of the old engine are not comparable with the new one; {told}: {said}."
    if outcome == "equal":
        return f"With the same GGUF the new engine answers as the old one: {said}; limit {limit}."
    if outcome == "worse":
        how = "otherwise, and worse"
        return f"With the same GGUF the new engine answers {how}: {said}; limit {limit}."
    return (
        f"With the same GGUF the new engine answers otherwise: {said}; limit {limit}. Whether that "
        "is worse, divergence cannot tell."
    )


def caused(record: EngineRecord, cause: Cause) -> str:
    """Say what made the difference in speed, as a clause."""
    is_one_file = record.champion.gguf_sha256 == record.challenger.gguf_sha256
    own = _CAUSED_BY_ENGINE.get(cause, "whether the engine changed the speed cannot be told")
    return own if is_one_file else _CAUSED[cause]


def speed_clauses(record: EngineRecord, outcome: Outcome | None = None) -> list[str]:
    """Return what the deciding tests show of the engine alone, those of one outcome if named."""
    return [
        wording.clause(
            compare_words.speed_sentence(
                test_name(one).capitalize(), one.engine.outcome, effect(one.engine), one.effect
            )
        )
        for one in record.speed
        if one.is_gated and outcome in {None, one.engine.outcome}
    ]


def engine_clauses(record: EngineRecord, outcome: Outcome) -> list[str]:
    """Return everything of one outcome that speaks of the engine on the same GGUF."""
    answers: EngineAnswers | None = record.answers
    said = [wording.clause(answers.sentence)] if answers and answers.outcome == outcome else []
    return [*speed_clauses(record, outcome), *said]


def outcome_sentence(record: EngineRecord) -> str:
    """Say the result of the whole in one sentence."""
    what = change_of_engine(record.champion, record.challenger)
    bad = [one for one in record.releases if one.outcome == "worse"]
    of_releases = "".join(f"; {wording.clause(one.sentence)}" for one in bad)
    if record.validity.verdict == "INVALID":
        why = wording.clause(record.validity.reasons[0]) if record.validity.reasons else "no reason"
        return f"INVALID: {what}: {why}{of_releases}."
    telling = "; ".join(engine_clauses(record, record.outcome))
    because = f": {telling}" if telling else ""
    said = {
        "worse": f"{what}: the engine is worse{because}",
        "undecided": f"{what}: undecided whether the engine is worse{because}",
        "equal": f"{what}: on the same GGUF the engine is as good, or better",
        "better": f"{what}: on the same GGUF the engine is better{because}",
    }[record.outcome]
    if bad and not telling:
        said = f"{what}: the engine is not good for what was released"
    cause = f"; {caused(record, record.cause)}" if record.speed else ""
    return f"{said}{of_releases}{cause}."


def sentences(record: EngineRecord) -> tuple[str, ...]:
    """Return what the record says: the result first, then each part, then notes."""
    answers = (record.answers.sentence, *record.answers.why_not) if record.answers else ()
    return (
        outcome_sentence(record),
        *answers,
        *(one.sentence for one in record.releases),
        *(filter(None, (record.releases_note, record.releases_problem))),
        *record.left_out,
        *record.validity.reasons[1:],
        *record.notes,
    )


# --- the table --------------------------------------------------------------------------------


def rows(record: EngineRecord) -> tuple[tuple[str, ...], ...]:
    """Return the table of the four combinations; INVALID: without speeds."""
    found = [_speed_row(one) for one in record.speed if record.validity.verdict == "VALID"]
    answers = record.answers
    if answers is not None and answers.engine is not None:
        told = (answers.engine, answers.model, answers.both)
        limit = wording.declared(answers.limit_nats)
        same = {
            "worse": f"more than {limit}, and worse",
            "undecided": f"not shown to be below {limit}",
        }.get(answers.outcome, f"below {limit}")
        dash = wording.ABSENT
        if answers.engine.kld_mean_nats is not None:
            klds = [nats(one.kld_mean_nats) if one else dash for one in told]
            found.append(("divergence, nats", "0", *klds, same, dash, dash, dash))
        ratios = [wording.number(one.ppl_ratio, 5) if one else dash for one in told]
        found.append(("perplexity, times", "1", *ratios, dash, dash, dash, dash))
    return tuple(found)


def _speed_row(one: EngineSpeed) -> tuple[str, ...]:
    speeds = (one.old_old_tok_s, one.old_new_tok_s, one.new_old_tok_s, one.new_new_tok_s)
    return (
        f"{test_name(one)}, tok/s",
        *(wording.number(each) for each in speeds),
        effect(one.engine),
        effect(one.model),
        effect(one.interaction),
        CAUSES[one.cause] if one.is_gated else f"{CAUSES[one.cause]} (not judged)",
    )


def table(record: EngineRecord) -> list[str]:
    """Set the table as lines for a terminal: a line for each head, a column for each test."""
    columns = [HEADS, *rows(record)]
    widths = [max(map(len, column)) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
