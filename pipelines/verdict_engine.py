"""
What a verdict asks of a changed engine: to be as good on the same file, and for what was released.

A record of the engine counts only if it speaks of the file, the context, the machine and the
llama.cpp that there are now, and of the same two sides as the comparison. What it says counts as a
comparison does: `worse` is REJECT, since every model of the fleet gets the new engine, and better
weights of one of them must not hide what it costs; what is undecided, or had no time, is HOLD, and
what others disturbed is INVALID. Nothing here reads a file or a clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import compare_engine_effects, compare_engine_words, stats_paired, wording
from pipelines.compare_records import CompareRecord
from pipelines.records import ChoiceRecord, QuantizeRecord
from pipelines.release_records import short
from pipelines.verdict_chain import is_trusted
from pipelines.verdict_words import Reason, differing, tidy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.compare_engine_records import Departure, EngineRecord, ReleaseTest
    from pipelines.compare_records import Outcome
    from pipelines.records import HostChoice
    from pipelines.verdict_evidence import Evidence
    from pipelines.verdict_words import Verdict

_FILE = "engine.json"
_AS_GOOD = "as good on the same GGUF, or better"


def of_host(known: Evidence, host: HostChoice, notes: list[str]) -> Iterator[Reason]:
    """
    Yield what stands against the engine on which the winner of a host would run.

    Args:
        known: What is known of the model.
        host: The choice for the host.
        notes: Grows by what only has to be shown.
    """
    built, found = known.quantized.get(host.winner or ""), known.engine
    if not isinstance(built, QuantizeRecord):
        return
    judge = _Judge(known, host)
    if isinstance(found, str):
        step = f"Remove results/{known.declared.model}/{_FILE}, or run `{judge.command}`"
        clause = f"what was measured of the engine cannot be read ({tidy(found)})"
        yield judge.reason("INVALID", clause, "unreadable", "a record of this version", step)
        return
    if found is None:
        yield from _missing(known, built, judge, notes)
        return
    stale = why_stale(known, found, built)
    if stale:
        notes.append(f"What was measured of the engine does not count on host {host.host}: {stale}")
        yield from _missing(known, built, judge, notes)
        return
    yield from judge.engine(found)
    yield from judge.releases(found)
    notes += filter(None, (found.releases_note,))
    if is_trusted(found.validity) and found.speed:
        cause = compare_engine_effects.overall(found.speed)
        notes.append(compare_engine_words.caused(found, cause))


def why_stale(known: Evidence, found: EngineRecord, built: QuantizeRecord) -> str:
    """Say as a clause why what was measured of the engine does not speak of a file; else empty."""
    choice, compared = known.choice, known.compared
    hw_id = choice.hw_id if isinstance(choice, ChoiceRecord) else None
    old, new = found.champion, found.challenger
    claims: list[tuple[str, object, object]] = [
        ("of another model", found.model, known.declared.model),
        ("of another file", new.gguf_sha256, built.gguf.sha256),
        ("at another context", found.context_tokens, known.declared.context_tokens),
        ("from other hardware", found.machine.hw_id, hw_id),
        ("of another llama.cpp", new.llama_cpp_commit, built.llama_cpp_commit),
    ]
    if isinstance(compared, CompareRecord):
        claims += [
            ("of another champion than the comparison", old.gguf_sha256,
             compared.champion.gguf_sha256),
            ("of another old engine than the comparison", old.toolchain_id,
             compared.champion.toolchain_id),
            ("of another new engine than the comparison", new.toolchain_id,
             compared.challenger.toolchain_id),
        ]  # fmt: skip
    for what, had, due in claims:
        if had != due:
            shown, wanted = differing(str(had), str(due))
            return f"it is {what} ({shown}, not {wanted})"
    return "both engines in it are one" if old.toolchain_id == new.toolchain_id else ""


def outcome(known: Evidence, found: EngineRecord) -> Outcome:
    """Return what a record of the engine says of it, held against what is declared now."""
    parts = [each for each in (_speed(known, found), _answers(found)) if each is not None]
    return stats_paired.worst_of(parts)


def _speed(known: Evidence, found: EngineRecord) -> Outcome | None:
    return compare_engine_effects.engine_outcome(found.speed, known.declared.compare_effects)


def _answers(found: EngineRecord) -> Outcome | None:
    """Return what its answers say by their own numbers; None where none were compared."""
    answers = found.answers
    if answers is None:
        return None
    return _by_numbers(answers.outcome, answers.engine)


def _by_numbers(recorded: Outcome, found: Departure | None) -> Outcome:
    if found is None:
        return stats_paired.worst_of((recorded, "undecided"))
    return compare_engine_effects.worse_of(recorded, compare_engine_effects.answers_outcome(found))


def _missing(
    known: Evidence, built: QuantizeRecord, judge: _Judge, notes: list[str]
) -> Iterator[Reason]:
    """Say that a changed engine was not measured alone, if a comparison shows that it changed."""
    compared = known.compared
    if not isinstance(compared, CompareRecord):
        return
    old, new = compared.champion, compared.challenger
    if new.gguf_sha256 != built.gguf.sha256 or old.toolchain_id == new.toolchain_id:
        return
    what = compare_engine_words.change_of_engine(old, new)
    clause = f"the engine changed ({tidy(what)}) and was not measured alone"
    if not known.declared.compare_required:
        notes.append(f"{clause}: `{judge.command}` does that")
        return
    clause = f"{clause} (compare.required)"
    yield judge.reason("HOLD", clause, "no record", "the engine on the same GGUF", judge.step)


class _Judge:
    """Words of the reasons about one model on one host."""

    def __init__(self, known: Evidence, host: HostChoice) -> None:
        self.known = known
        self.host = host.host
        self.command = f"fleet compare {known.declared.model}"
        self.step = f"Run `{self.command}`"
        self.quiet = f"{self.step} on a quiet machine"
        self.keep = (
            f"Leave `toolchain` where it is, or see what the new llama.cpp does to "
            f"{known.declared.model} and run `{self.command}`"
        )

    def reason(self, verdict: Verdict, clause: str, value: str, limit: str, step: str) -> Reason:
        return Reason(
            rule="engine",
            verdict=verdict,
            clause=clause,
            value=value,
            limit=limit,
            file=self.known.file(_FILE),
            next_step=step,
            host=self.host,
        )

    def engine(self, found: EngineRecord) -> Iterator[Reason]:
        """Yield what the engine does to the same file: to its speed and to its answers."""
        what = tidy(compare_engine_words.change_of_engine(found.champion, found.challenger))
        is_valid = is_trusted(found.validity)
        compared = self.known.compared
        is_said = isinstance(compared, CompareRecord) and not is_trusted(compared.validity)
        if not is_valid and not is_said:
            why = wording.clause(tidy((*found.validity.reasons, "no reason is given")[0]))
            clause = f"the speed of the engine alone ({what}) is INVALID: {why}"
            yield self.reason("INVALID", clause, "INVALID", "VALID", self.quiet)
        speed = _speed(self.known, found) if is_valid else None
        told = {
            "speed": (speed, compare_engine_words.speed_clauses(found)),
            "answers": (
                _answers(found),
                [wording.clause(found.answers.sentence)] if found.answers else [],
            ),
        }
        for part, (outcome_, clauses) in told.items():
            if outcome_ not in {"worse", "undecided"}:
                continue
            is_worse = outcome_ == "worse"
            said = tidy("; ".join(clauses)) or f"by its {part}"
            step = f"{self.quiet}; more pairs (compare.pairs) decide"
            yield self.reason(
                "REJECT" if is_worse else "HOLD",
                f"the engine ({what}) is {'worse' if is_worse else 'not shown to be as good'} on "
                f"the same GGUF: {said}",
                f"{part} {outcome_}",
                _AS_GOOD,
                self.keep if is_worse or part == "answers" else step,
            )
        if found.left_out:
            clause = f"of the engine ({what}) was not measured: {_first(found.left_out)}"
            value = wording.counted(len(found.left_out), "part") + " left out"
            step = f"Raise compare.max_minutes, or {self.step.lower()} --budget MINUTES"
            yield self.reason("HOLD", clause, value, "all parts", step)
        elif is_valid and speed is None and _answers(found) != "worse":
            clause = f"the speed of the engine alone ({what}) was not measured"
            yield self.reason("HOLD", clause, "no test", "a test", self.step)

    def releases(self, found: EngineRecord) -> Iterator[Reason]:
        """Yield each release that the new engine does not run as the old one did."""
        for one in found.releases:
            outcome_ = _of_release(one)
            if outcome_ in {"equal", "better"}:
                continue
            is_worse = outcome_ == "worse"
            fails = "fails on" if is_worse else "is not shown to run as before on"
            clause = (
                f"release {short(one.release)} {fails} the new engine, so that a rollback would "
                f"not bring it back: {wording.clause(tidy(one.sentence))}"
            )
            value = f"release {short(one.release)} {outcome_}"
            yield self.reason(
                "REJECT" if is_worse else "HOLD", clause, value, "as on the old engine", self.keep
            )
        if found.releases_problem:
            clause = wording.clause(tidy(found.releases_problem))
            step = f"See `fleet audit {found.model}`, then {self.step.lower()}"
            yield self.reason("HOLD", clause, "not tried", "every release tried", step)


def _of_release(one: ReleaseTest) -> Outcome:
    """Return what a test of a release says by its own numbers."""
    if one.loads is not True:
        return "worse" if one.loads is False and one.outcome == "worse" else "undecided"
    if one.answers is None:
        return one.outcome
    return _by_numbers(one.outcome, one.answers)


def _first(texts: tuple[str, ...]) -> str:
    more = f", and {len(texts) - 1} more" if len(texts) > 1 else ""
    return f"{wording.clause(tidy(texts[0]))}{more}"
