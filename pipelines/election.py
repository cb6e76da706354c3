"""The choice for one host: who may stand, who wins, and what is said to everybody."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from pipelines import wording
from pipelines.evidence import Doubted, Evidence, Trusted
from pipelines.limits import Miss, memory_limit_mib, memory_miss, misses
from pipelines.objectives import OBJECTIVES, speed_words
from pipelines.records import Candidate, HostChoice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from pipelines.params import ChooseSlice

    Verdict = Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]


class Election:
    """The choice for one host: who may stand, who wins, and what is said to everybody."""

    def __init__(  # noqa: PLR0913, PLR0917 - each is one independent fact
        self,
        slice_: ChooseSlice,
        host: str,
        evidence: Sequence[Evidence],
        dominators: Mapping[str, str],
        incumbent: str | None,
        also_missed: Mapping[str, Sequence[Miss]] | None = None,
    ) -> None:
        """
        Hold it.

        Args:
            slice_: What `choose` of the model reads.
            host: Key of the host.
            evidence: Every declared quant, in the order of the declaration.
            dominators: For each type off the Pareto front one that makes it pointless.
            incumbent: Type that was chosen for the host in the last commit, if one was.
            also_missed: By type, what a quant failed at beside gates and memory.
        """
        self.slice = slice_
        self.host = host
        self.evidence = evidence
        self.dominators = dominators
        self.incumbent = incumbent
        self.metric, self.order = OBJECTIVES[slice_.objective]
        self.doubts = {one.type: one.reason for one in evidence if isinstance(one, Doubted)}
        self.also_missed = also_missed or {}
        self.missed: dict[str, list[Miss]] = {}
        self.passing: list[Trusted] = []
        self._judge()
        self.winner = self._best(self.passing, incumbent)
        rest = [one for one in self.passing if one is not self.winner]
        self.runner_up = self._best(rest, incumbent)

    def _judge(self) -> None:
        for one in self.evidence:
            if isinstance(one, Doubted):
                continue
            missed, unjudged = misses(one, self.slice.gates)
            missed += memory_miss(one, self.slice, self.host)
            missed += self.also_missed.get(one.type, ())
            if missed:
                self.missed[one.type] = missed
            elif unjudged:
                self.doubts[one.type] = "; ".join(unjudged)
            else:
                self.passing.append(one)

    def _clearly_better(self, one: Trusted, other: Trusted) -> bool:
        return self.metric.clearly_better(one, other, self.slice.choose)

    def _field(self, among: Sequence[Trusted]) -> list[Trusted]:
        """Return those that nobody clearly beats in the objective."""
        return [x for x in among if not any(self._clearly_better(y, x) for y in among)]

    def _best(self, among: Sequence[Trusted], incumbent: str | None) -> Trusted | None:
        field = self._field(among)
        kept = [one for one in field if one.type == incumbent]
        return min(kept or field, key=self._rank, default=None)

    def _rank(self, one: Trusted) -> tuple[float | str, ...]:
        return (*(metric.cost(one) for metric in self.order), one.type)

    # --- what is said ---

    def result(self) -> HostChoice:
        """Put the outcome into a record."""
        spec = self.slice.hosts[self.host]
        return HostChoice(
            host=self.host,
            limit_mib=memory_limit_mib(spec),
            margin_mib=spec.margin_mib,
            incumbent=self.incumbent,
            winner=self.winner.type if self.winner else None,
            runner_up=self.runner_up.type if self.runner_up else None,
            verdict=self._verdict(),
            sentence=self._sentence(),
            binding=self._binding(),
            candidates=tuple(self._candidate(one) for one in self.evidence),
        )

    def _verdict(self) -> Verdict:
        if self.winner:
            return "HOLD" if self.doubts else "PROMOTE"
        if self.missed:
            return "HOLD" if self.doubts else "REJECT"
        return "INVALID"

    def _sentence(self) -> str:
        verdict = self._verdict()
        if verdict == "PROMOTE":
            return f"promote {self._praise()}"
        if verdict == "HOLD":
            leader = self._praise(leads=True) if self.winner else self._none_passes()
            return f"hold: {leader}; {self._open_questions()}"
        if verdict == "REJECT":
            return f"reject: {self._none_passes()}"
        return f"invalid: {self._open_questions() if self.evidence else 'no quant is declared'}"

    def _none_passes(self) -> str:
        judged = len(self.missed)
        return (
            f"none of the {judged} judged quants passes"
            if judged > 1
            else (f"{next(iter(self.missed))} does not pass")
        )

    def _open_questions(self) -> str:
        if len(self.doubts) == 1:
            type_, reason = next(iter(self.doubts.items()))
            return f"{type_} cannot be judged ({reason})"
        disturbed = {o.type for o in self.evidence if isinstance(o, Doubted) and o.steady}
        why = (
            " (their measurements were disturbed: `fleet repro` on a quiet machine repeats them)"
            if disturbed.issuperset(self.doubts)
            else ""
        )
        return f"{wording.listed(list(self.doubts))} cannot be judged{why}"

    def _praise(self, *, leads: bool = False) -> str:
        """Say who wins and why: `Q4_K_M: the fastest of 3 quants that pass (598 tok/s ...)`."""
        winner = self.winner
        assert winner is not None
        verb = f"{winner.type} leads, " if leads else f"{winner.type}: "
        return f"{verb}{self._why(winner)} ({self._figures(winner)})"

    def _why(self, winner: Trusted) -> str:
        field = self._field(self.passing)
        total = len(self.passing)
        if len(self.slice.quants) == 1:
            return "the only quant, and it passes"
        if total == 1:
            return f"the only one of {len(self.slice.quants)} quants that passes"
        if len(field) == 1:
            return f"the {self.metric.best} of the {total} quants that pass"
        if winner.type == self.incumbent:
            return (
                f"the committed choice, and no quant that passes is clearly {self._comparative()}"
            )
        tie = f"the {len(field)} {self.metric.best} quants, {self._which_tie(field)}"
        return f"the {self.order[0].best} of {tie}"

    def _which_tie(self, field: Sequence[Trusted]) -> str:
        """Say in which way none of several quants is clearly better than another."""
        pairs = list(combinations(field, 2))
        if all(self._is_close(one, other) for one, other in pairs):
            return f"which are within {self._effect()} of each other"
        if all(self.metric.overlap(one, other) for one, other in pairs):
            return "whose intervals overlap"
        return f"whose intervals overlap or which are within {self._effect()} of each other"

    def _is_close(self, one: Trusted, other: Trusted) -> bool:
        return self.metric.within_effect(one, other, self.slice.choose)

    def _effect(self) -> str:
        return f"{wording.declared(self.metric.effect(self.slice.choose) * 100)} %"

    def _figures(self, one: Trusted) -> str:
        return (
            f"{wording.number(one.speed_tok_s.value)} tok/s {speed_words(one)}, "
            f"{wording.number(one.divergence.value)} {one.divergence.unit}, "
            f"{wording.number(one.memory_mib.value)} MiB"
        )

    def _binding(self) -> str:
        """Say which limit kept the next better quant out."""
        turned_away = [
            one for one in self.evidence if isinstance(one, Trusted) and one.type in self.missed
        ]
        if self.winner is None:
            return self._nearest_miss(turned_away)
        better = [one for one in turned_away if self._clearly_better(one, self.winner)]
        if not better:
            return f"No limit keeps out a quant that is clearly {self._comparative()}."
        next_one = min(better, key=self.metric.cost)
        lead = self.metric.compare(self.winner, next_one)
        return (
            f"{self.winner.type} is {lead}, but {next_one.type} is out: {self._why_out(next_one)}."
        )

    def _comparative(self) -> str:
        return {"speed": "faster", "quality": "closer to f16", "size": "smaller"}[
            self.slice.objective
        ]

    def _nearest_miss(self, turned_away: Sequence[Trusted]) -> str:
        if not turned_away:
            return ""

        def distance(one: Trusted) -> tuple[float, str]:
            return max(miss.excess for miss in self.missed[one.type]), one.type

        nearest = min(turned_away, key=distance)
        return f"{nearest.type} comes closest: {self._why_out(nearest)}."

    def _why_out(self, one: Trusted) -> str:
        return "; ".join(miss.text for miss in self.missed[one.type])

    def _candidate(self, one: Evidence) -> Candidate:
        if isinstance(one, Doubted):
            return Candidate(
                key=one.key,
                type=one.type,
                verdict="INVALID",
                on_frontier=False,
                sentence=wording.sentence(f"{one.type}: {one.reason}{_what_holds(one)}"),
                **(one.steady.steady_numbers() if one.steady else {}),
            )
        return Candidate(
            key=one.key,
            type=one.type,
            verdict=self._candidate_verdict(one),
            on_frontier=one.type not in self.dominators,
            sentence=wording.sentence(f"{one.type}: {self._candidate_words(one)}"),
            **one.numbers(),
        )

    def _candidate_verdict(self, one: Trusted) -> Literal["CHOSEN", "PASS", "REJECT", "INVALID"]:
        if one is self.winner:
            return "CHOSEN"
        if one.type in self.missed:
            return "REJECT"
        return "INVALID" if one.type in self.doubts else "PASS"

    def _candidate_words(self, one: Trusted) -> str:
        if one is self.winner:
            return f"{self._why(one)} ({self._figures(one)})"
        if one.type in self.doubts:
            return self.doubts[one.type]
        dominator = self.dominators.get(one.type)
        dominated = (
            f"; {dominator} is as good or better in memory, divergence and speed"
            if dominator
            else ""
        )
        if one.type in self.missed:
            return self._why_out(one) + dominated
        return f"passes; {self._why_not(one)}{dominated}"

    def _why_not(self, one: Trusted) -> str:
        """Say what a quant that passes lost to."""
        winner = self.winner
        assert winner is not None
        if self._clearly_better(winner, one):
            return self.metric.compare(one, winner)
        faster = [other for other in self.passing if self._clearly_better(other, one)]
        if faster:
            return self.metric.compare(one, min(faster, key=self._rank_by_metric))
        why = (
            f"within {self._effect()}" if self._is_close(one, winner) else "their intervals overlap"
        )
        tie = f"{self.metric.equal} {winner.type} ({why})"
        if winner.type == self.incumbent:
            return f"{tie}, and {winner.type} is the committed choice"
        decisive = next((m for m in self.order if m.cost(one) != m.cost(winner)), None)
        if decisive is None:
            return f"equal to {winner.type} in every number"
        return f"{tie}, and {decisive.compare(one, winner)}"

    def _rank_by_metric(self, one: Trusted) -> tuple[float, str]:
        return self.metric.cost(one), one.type


def _what_holds(one: Doubted) -> str:
    """Say which numbers a disturbed measurement still gives."""
    if one.steady is None:
        return ""
    holds = ["size", "divergence"]
    if one.steady.steady_numbers()["memory_mib"] is not None:
        holds.append("memory")
    return f"; {wording.listed(holds)} do not depend on that"
