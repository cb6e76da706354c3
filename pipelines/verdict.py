"""
The verdict on a model, by one pure function: PROMOTE, HOLD, REJECT or INVALID, and why.

The verdict is the worst of its reasons. It fails closed: a record that is missing, stale, of other
bytes than the one before it, or with a number that is none makes the model INVALID, whatever the
others say. A host without a winner has no file that a load test or a comparison could speak of; its
verdict is that of `choose`. What a person may let pass (a waiver of the declaration) still is a
reason and is shown; it only counts no more.

`judge` is the only judgement there is: `publish` and the report read it, and docs/verdict.md is
made by it (`pipelines.verdict_table`). Nothing here reads a file or a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from pipelines import golden, load_verdict, verdict_engine, verdict_served, wording
from pipelines.records import BenchmarkRecord, ChoiceRecord, EmbeddingQuality
from pipelines.verdict_chain import Chain, finite, served_of
from pipelines.verdict_rules import Rules
from pipelines.verdict_words import (
    SENTENCE_CHARACTERS,
    VERDICTS,
    WORDS,
    Reason,
    Verdict,
    capital,
    severest,
    tidy,
    without_verb,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.load_records import LoadTestRecord, WinnerTest
    from pipelines.records import HostChoice
    from pipelines.release_records import ReleaseWaiver
    from pipelines.verdict_evidence import Evidence
    from pipelines.verdict_served import Served

__all__ = ["VERDICTS", "HostFinal", "ModelVerdict", "Reason", "Verdict", "final", "judge", "worst"]

NOTHING_CHOSEN: Final = "nothing is chosen"
# In one headline.
_MOST_CLAUSES: Final = 3
_HEADLINE_CHARACTERS: Final = 2000


@dataclass(frozen=True, kw_only=True)
class HostFinal:
    """
    The verdict for one host.

    Attributes:
        host: Its name.
        verdict: The worst of its reasons, and of those of the model that nobody let pass. A waiver
            of `hold` changes what may be released, not what was found.
        sentence: The verdict in words, without a full stop; it begins with the verdict.
        own_verdict: The same without what stands against the whole model.
        own_sentence: That in words.
        reasons: All that stands against it, from bad to good.
        details: Sentences that `sentence` replaces or shortens.
        next_step: What to do, as a sentence.
        test: The load test that speaks of the chosen file, None where there is none.
    """

    host: str
    verdict: Verdict
    sentence: str
    own_verdict: Verdict
    own_sentence: str
    reasons: tuple[Reason, ...]
    details: tuple[str, ...]
    next_step: str
    test: WinnerTest | None


@dataclass(frozen=True, kw_only=True)
class ModelVerdict:
    """
    The verdict on a model.

    Attributes:
        verdict: The worst of all reasons that count, on every host.
        sentence: It in words, without a full stop.
        reasons: All reasons, from bad to good, those that somebody let pass included.
        notes: What does not change the verdict and has to be seen, as sentences.
        next_step: What to do, as a sentence.
        hosts: The verdict for each host; empty if nothing was chosen from.
        waivers: Those without which more would count.
        released: Hosts that a release may serve.
        types: Quants that it may hold, in the order of the declaration.
        is_stale: Whether the choice speaks of other numbers or files than there are, or of another
            declaration: nothing of it may be shown beside them.
        license: The Hub's word for the licence.
    """

    model: str
    verdict: Verdict
    sentence: str
    reasons: tuple[Reason, ...]
    notes: tuple[str, ...]
    next_step: str
    hosts: tuple[HostFinal, ...]
    waivers: tuple[ReleaseWaiver, ...]
    released: tuple[str, ...]
    types: tuple[str, ...]
    is_stale: bool
    license: str


def judge(evidence: Evidence) -> ModelVerdict:
    """Judge a model by everything that is known of it."""
    given = Chain(evidence)
    # What holds a number that is none speaks of nothing any more.
    evidence = finite(evidence)
    chain, rules = Chain(evidence), Rules(evidence)
    of_choice = tuple(chain.choice())
    of_model = (
        *given.records(),
        *given.numbers(),
        *chain.links(),
        *of_choice,
        *rules.verify(),
        *rules.evals(),
        *rules.access(),
    )
    choice = evidence.choice
    hosts = choice.hosts if isinstance(choice, ChoiceRecord) else ()
    finals = tuple(_host(one, evidence, chain, rules, of_model) for one in hosts)
    own = [each for one in finals for each in one.reasons if each.host]
    if not hosts and isinstance(choice, ChoiceRecord):
        of_model = (*of_model, _no_host(evidence))
    reasons = tuple(severest([*of_model, *own]))
    released = _released(finals, choice, [each for each in of_model if each.counts])
    counting = [each for each in reasons if each.counts]
    verdict = worst("PROMOTE", *(each.verdict for each in counting))
    return ModelVerdict(
        model=evidence.declared.model,
        verdict=verdict,
        sentence=_sentence(verdict, counting, finals),
        reasons=reasons,
        notes=tuple(dict.fromkeys(wording.sentence(capital(tidy(one))) for one in rules.notes)),
        next_step=_next_step(verdict, counting, evidence.declared.model),
        hosts=finals,
        waivers=_waivers(rules, reasons),
        released=released,
        types=_types(evidence, released),
        is_stale=bool(of_choice),
        license=rules.license(),
    )


def final(choice: ChoiceRecord, tested: LoadTestRecord | str) -> tuple[HostFinal, ...]:
    """
    Judge every host by the choice and the load test alone: a part of `judge`.

    Args:
        choice: What was chosen.
        tested: The load test, or as a clause why there is none.
    """
    return tuple(_composed(one, choice, _served(one, choice, tested), ()) for one in choice.hosts)


# --- one host ---------------------------------------------------------------------------------


def _served(
    one: HostChoice, choice: ChoiceRecord, tested: LoadTestRecord | str, *, embeds: bool = False
) -> Served | None:
    if one.winner is None:
        return None
    return verdict_served.of_host(one, choice, tested, embeds=embeds)


def _host(
    one: HostChoice, evidence: Evidence, chain: Chain, rules: Rules, of_model: Sequence[Reason]
) -> HostFinal:
    """Judge one host: what holds for the model, then what is special about its winner."""
    choice = evidence.choice
    assert isinstance(choice, ChoiceRecord), "it has hosts"
    own = (
        *chain.gates(one),
        *rules.harm_of(one),
        *rules.comparison_of(one),
        *verdict_engine.of_host(evidence, one, rules.notes),
    )
    measured = evidence.measured.get(one.winner or "")
    embeds = isinstance(measured, BenchmarkRecord) and isinstance(
        measured.quality, EmbeddingQuality
    )
    served = _served(one, choice, evidence.tested, embeds=embeds)
    alone = _composed(one, choice, served, own)
    found = replace(
        _composed(one, choice, served, (*of_model, *own)),
        own_verdict=alone.own_verdict,
        own_sentence=alone.own_sentence,
    )
    if alone.verdict != "HOLD":
        return found
    let_pass, step = rules.waivable("hold", "")
    reasons = tuple(
        replace(
            each, let_pass=let_pass, next_step=_joined(each.next_step, "" if let_pass else step)
        )
        if each.host
        else each
        for each in found.reasons
    )
    counting = [each for each in reasons if each.counts]
    return replace(
        found, reasons=reasons, next_step=_next_step(found.verdict, counting, choice.model)
    )


def _joined(first: str, second: str) -> str:
    return " ".join(filter(None, (first, second)))


def _composed(
    one: HostChoice, choice: ChoiceRecord, served: Served | None, others: Sequence[Reason]
) -> HostFinal:
    """Put the reasons of a host into a verdict and a sentence."""
    chosen = tidy(one.sentence, SENTENCE_CHARACTERS)
    by_choice = _choice_reason(one, choice)
    beside = [*others, *(served.reasons if served else ())]
    against = severest([each for each in beside if each.counts])
    of_choice = worst("PROMOTE", *(each.verdict for each in by_choice))
    found = worst("PROMOTE", *(each.verdict for each in against))
    verdict = worst(of_choice, found)
    # All that comes from where the worst one comes from is said at once.
    first = [each for each in against if (each.verdict, each.rule) == (found, against[0].rule)]
    clause = _told(first) or (served.praise if served else "")
    sentence, details = chosen, [clause] if clause else []
    if found in ("PROMOTE", of_choice):
        sentence, details = "; ".join(filter(None, (chosen, clause))), []
    elif verdict == found:
        # What stops it first, then why it was chosen.
        but = f"{tidy(one.winner)} is chosen, but {clause}" if one.winner else clause
        sentence, details = f"{WORDS[verdict]}: {but}", [without_verb(chosen, one.verdict)]
    details += [each.sentence for each in severest(beside) if each not in first]
    reasons = severest([*by_choice, *beside])
    sentence = tidy(sentence, _HEADLINE_CHARACTERS)
    return HostFinal(
        host=one.host,
        verdict=verdict,
        sentence=sentence,
        own_verdict=verdict,
        own_sentence=sentence,
        reasons=tuple(reasons),
        details=tuple(
            wording.sentence(capital(tidy(text, _HEADLINE_CHARACTERS))) for text in details
        ),
        next_step=_next_step(verdict, [each for each in reasons if each.counts], choice.model),
        test=served.test if served else None,
    )


def _told(first: Sequence[Reason]) -> str:
    """Join the clauses of the worst reasons; of many the first ones, and how many more."""
    clauses = list(dict.fromkeys(each.clause for each in first))
    shown = clauses[:_MOST_CLAUSES]
    more = len(clauses) - len(shown)
    further = [f"and {wording.counted(more, 'further reason')}"] if more else []
    return "; ".join([*shown, *further])


def _choice_reason(one: HostChoice, choice: ChoiceRecord) -> list[Reason]:
    """Return what `choose` itself has against a promotion; nothing of one that it promotes."""
    if one.verdict == "PROMOTE" and one.winner is not None:
        return []
    passing = sum(each.verdict in {"CHOSEN", "PASS"} for each in one.candidates)
    doubted = sum(each.verdict == "INVALID" for each in one.candidates)
    steps: dict[Verdict, str] = {
        "PROMOTE": f"Run `fleet repro {choice.model}`",
        "HOLD": f"`fleet repro {choice.model}` on a quiet machine judges what is in doubt",
        "REJECT": "Declare a quant, a gate or a host that fits; `fleet report` says what kept each "
        "quant out",
        "INVALID": f"`fleet repro {choice.model}` measures again what is not to be trusted",
    }
    why = without_verb(tidy(one.sentence, SENTENCE_CHARACTERS), one.verdict)
    return [
        Reason(
            rule="choose",
            # A promotion of nothing contradicts itself.
            verdict="INVALID" if one.verdict == "PROMOTE" else one.verdict,
            clause=why or NOTHING_CHOSEN,
            value=f"{passing:,} of {len(one.candidates):,} quants pass, {doubted:,} in doubt",
            limit="one that passes, and none in doubt",
            file=f"{choice.model}/choice.json",
            next_step=steps[one.verdict],
            host=one.host,
        )
    ]


# --- the model --------------------------------------------------------------------------------


def _no_host(evidence: Evidence) -> Reason:
    return Reason(
        rule="choose",
        verdict="INVALID",
        clause=f"{NOTHING_CHOSEN}: choice.json holds no host",
        value="0 hosts",
        limit=f"{len(evidence.declared.hosts)} hosts",
        file=evidence.file("choice.json"),
        next_step=f"Run `fleet repro {evidence.declared.model}`",
    )


def _sentence(verdict: Verdict, counting: Sequence[Reason], hosts: Sequence[HostFinal]) -> str:
    """Say the verdict on a model: that of its worst host, or what holds for all of them."""
    of_host = [one for one in hosts if one.verdict == verdict]
    if of_host:
        return of_host[0].sentence
    if counting:
        return f"{WORDS[verdict]}: {counting[0].clause}"
    return (
        f"{WORDS[verdict]}: {'; '.join(without_verb(one.sentence, one.verdict) for one in hosts)}"
    )


def _next_step(verdict: Verdict, reasons: Sequence[Reason], model: str) -> str:
    first = next((each for each in severest(reasons) if each.verdict == verdict), None)
    return first.next_step if first else f"`fleet repro {model}` releases it."


def _waivers(rules: Rules, reasons: Sequence[Reason]) -> tuple[ReleaseWaiver, ...]:
    """Return the waivers that take a reason away, those of hosts first."""
    used = {
        "hold": any(each.let_pass and each.host for each in reasons),
        "license": any(each.let_pass and each.rule == "license" for each in reasons),
        "gated": any(each.let_pass and each.rule == "gated" for each in reasons),
    }
    found = (rules.waiver(gate) for gate in ("hold", "license", "gated") if used[gate])
    return tuple(one for one in found if one is not None)


def _released(
    hosts: Sequence[HostFinal], choice: ChoiceRecord | str, against_all: Sequence[Reason]
) -> tuple[str, ...]:
    """
    Return the hosts that a release may serve: PROMOTE, or HOLD that somebody let pass.

    None at all while something stands against the whole model, or while one host is INVALID: its
    numbers are nobody's numbers. A host for which nothing was chosen is served by nothing.
    """
    is_invalid = any(one.verdict == "INVALID" for one in hosts)
    if isinstance(choice, str) or against_all or is_invalid:
        return ()
    winners = {one.host for one in choice.hosts if one.winner is not None}
    return tuple(
        one.host
        for one in hosts
        if one.host in winners and not any(each.counts for each in one.reasons)
    )


def _types(evidence: Evidence, released: Sequence[str]) -> tuple[str, ...]:
    """
    Return what passed its gates on a released host and was served, in the order of declaration.

    A quant that failed its smoke makes its host HOLD; a waiver of that does not bring it in. One
    that won for another host and failed there at more than that host's levels stays out as well.
    """
    choice, tested = evidence.choice, evidence.tested
    if isinstance(choice, str) or isinstance(tested, str):
        return ()
    passed = {
        each.type
        for host in choice.hosts
        for each in host.candidates
        if host.host in released and each.verdict in {"CHOSEN", "PASS"}
    }
    return tuple(
        type_
        for type_ in evidence.declared.quants.values()
        if type_ in passed
        and served_of(tested, type_) is not None
        and all(_is_sound(test) for test in tested.winners if test.type == type_)
    )


def _is_sound(test: WinnerTest) -> bool:
    """Tell whether a test found nothing wrong with the quant itself, whatever its host asks for."""
    return (
        not test.failures
        and not test.invalid
        and (test.golden is None or golden.objection(test.golden) is None)
        and (test.embeddings is None or load_verdict.is_same_embedding(test.embeddings))
        and (test.degenerate is None or test.degenerate.outcome != "FAIL")
        and all(one.outcome != "FAIL" for one in test.regressions)
    )
