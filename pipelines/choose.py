"""
The best quant of one model for each host, and one sentence for each of the others.

The rule, in order; nothing is weighed against anything else, so that every step can be audited:

1. Doubt first: a quant whose measurement cannot be trusted or compared never wins
   (`pipelines.evidence`).
2. Gates: each declared limit must be kept. A limit that cannot be judged is not kept.
3. Memory: the worse of predicted and measured memory, plus the margin, must fit the host.
4. Objective: `speed` is decode speed at the deepest measured depth, `quality` the mean divergence,
   `size` the size of the file. A quant leaves the field if another one is *clearly* better: by more
   than the minimum effect and with intervals that do not touch.
5. Who is left is equally good. The incumbent stays if it is among them. Otherwise the order is
   exact: lower divergence, smaller file, faster, name; for `quality` faster before smaller.

Step 4 compares with everybody and step 5 is a total order. So what is worsened never gains, and
leaving out a quant that failed, or that another one clearly beats, never changes the winner.

Why speed first, below a ceiling on divergence: close to the original, divergence does not rank
quants (arXiv 2606.19558), while speed and memory are measured to a percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import atomic, proc, records, wording
from pipelines.errors import MachineError
from pipelines.evidence import MIB, Doubted, Evidence, Measured, Trusted, examine
from pipelines.records import (
    BenchmarkRecord,
    Candidate,
    ChoiceRecord,
    HostChoice,
    QuantizeRecord,
    RecordError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Literal

    from pipelines.layout import Layout
    from pipelines.params import Choose, ChooseSlice, Gates, Host, Objective

    Verdict = Literal["PROMOTE", "HOLD", "REJECT", "INVALID"]

# Below it a 99.9th percentile rests on a handful of tokens.
MIN_CHUNKS_FOR_TAIL = 400
_GIT_EXIT_ABSENT = 128
_GIT_SAYS_ABSENT = (
    "not a git repository",
    "does not exist in",
    "but not in",
    "invalid object name",
)


def choose(
    slice_: ChooseSlice,
    quantized: Mapping[str, QuantizeRecord | str],
    measured: Mapping[str, BenchmarkRecord | str],
    incumbents: Mapping[str, str] | None = None,
) -> ChoiceRecord:
    """
    Choose; no file is read or written.

    Args:
        slice_: Quants, gates, objective, minimum effects and hosts.
        quantized: Record of each declared key, or why there is none.
        measured: Record of each declared key, or why there is none.
        incumbents: Type that each host has in service, if known.
    """
    evidence = examine(slice_, quantized, measured)
    trusted = [one for one in evidence if isinstance(one, Trusted)]
    dominators = _dominators(trusted, slice_.choose)
    return ChoiceRecord(
        model=slice_.model,
        objective=slice_.objective,
        context_tokens=slice_.context_tokens,
        decode_depth_tokens=trusted[0].deepest_decode.depth_tokens if trusted else None,
        hw_id=trusted[0].benchmark.machine.hw_id if trusted else None,
        gates=slice_.gates.model_dump(exclude_none=True),
        notes=(),
        hosts=tuple(
            _Election(slice_, host, evidence, dominators, (incumbents or {}).get(host)).result()
            for host in slice_.hosts
        ),
    )


# --- objectives -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Metric:
    """One measured value, which way is better, and the words for it."""

    best: str
    worse: str
    equal: str
    unit: str
    read: Callable[[Trusted], Measured]
    effect: Callable[[Choose], float]
    more_is_better: bool = False

    def clearly_better(self, one: Trusted, other: Trusted, effects: Choose) -> bool:
        """
        Tell whether `one` beats `other` by more than the minimum effect and more than the noise.

        A strict partial order: it has no cycles, and who is beaten by a beaten one is beaten.
        """
        a, b, effect = self.read(one), self.read(other), self.effect(effects)
        if self.more_is_better:
            return a.low > b.high and a.value * (1 - effect) > b.value
        return a.high < b.low and a.value * (1 + effect) < b.value

    def cost(self, one: Trusted) -> float:
        """Return the value such that less is better."""
        value = self.read(one).value
        return -value if self.more_is_better else value

    def compare(self, loser: Trusted, winner: Trusted) -> str:
        """Say how far behind one is: `31 % slower than Q4_K_M (412 against 598 tok/s)`."""
        mine, best = self.read(loser).value, self.read(winner).value
        share = (1 - mine / best if self.more_is_better else mine / best - 1) if best else math.inf
        shown, shown_best = wording.pair(mine, best)
        lead = f"{wording.percent(share)} " if math.isfinite(share) else ""
        depth = (
            f" at depth {wording.tokens(loser.deepest_decode.depth_tokens)}"
            if self is _SPEED
            else ""
        )
        return (
            f"{lead}{self.worse} than {winner.type} "
            f"({shown} against {shown_best} {self.unit}{depth})"
        )


_SPEED = _Metric(
    "fastest", "slower", "as fast as", "tok/s",
    lambda one: one.decode_tok_s, lambda effects: effects.min_speed_effect, more_is_better=True,
)  # fmt: skip
_QUALITY = _Metric(
    "least divergent", "more divergent", "as close to f16 as", "nats",
    lambda one: one.kld_mean_nats, lambda effects: effects.min_quality_effect,
)  # fmt: skip
_SIZE = _Metric(
    "smallest", "larger", "as small as", "MiB",
    lambda one: one.size_mib, lambda effects: effects.min_size_effect,
)  # fmt: skip
_MEMORY = _Metric(
    "smallest in memory", "larger in memory", "as small in memory as", "MiB",
    lambda one: one.memory_mib, lambda effects: effects.min_size_effect,
)  # fmt: skip

# The metric that decides, then those that decide between equals, exactly.
_OBJECTIVES: dict[Objective, tuple[_Metric, tuple[_Metric, ...]]] = {
    "speed": (_SPEED, (_QUALITY, _SIZE, _SPEED)),
    "quality": (_QUALITY, (_SPEED, _SIZE, _QUALITY)),
    "size": (_SIZE, (_QUALITY, _SPEED, _SIZE)),
}


def _dominators(trusted: Sequence[Trusted], effects: Choose) -> dict[str, str]:
    """
    Name, for each quant off the Pareto front, one that makes it pointless.

    A quant dominates another if it is clearly worse in none of memory at the declared context,
    mean divergence and decode speed, and clearly better in at least one.
    """
    axes = (_MEMORY, _QUALITY, _SPEED)

    def dominates(one: Trusted, other: Trusted) -> bool:
        return not any(axis.clearly_better(other, one, effects) for axis in axes) and any(
            axis.clearly_better(one, other, effects) for axis in axes
        )

    above = {one.type: [o for o in trusted if dominates(o, one)] for one in trusted}
    return {
        type_: min(
            those, key=lambda one: (bool(above[one.type]), _QUALITY.cost(one), one.type)
        ).type
        for type_, those in above.items()
        if those
    }


# --- gates and memory -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gate:
    """One limit of the declaration: what it limits, in words and in numbers."""

    words: str
    unit: str
    read: Callable[[Trusted], float | None]
    is_floor: bool = False


_GATES: dict[str, _Gate] = {
    "max_kld_mean_nats": _Gate("mean divergence", " nats", lambda q: q.kld_mean_nats.value),
    "max_kld_p999_nats": _Gate(
        "99.9th percentile of the divergence",
        " nats",
        lambda q: (
            q.benchmark.quality.kld_p999_nats
            if q.benchmark.quality.chunks_count >= MIN_CHUNKS_FOR_TAIL
            else None
        ),
    ),
    "min_same_top": _Gate(
        "share of equal top tokens", "", lambda q: q.benchmark.quality.same_top, is_floor=True
    ),
    "max_ppl_ratio": _Gate("perplexity ratio", "", lambda q: q.benchmark.quality.ppl_ratio),
    "min_decode_tok_s": _Gate(
        "decode speed", " tok/s", lambda q: q.decode_tok_s.value, is_floor=True
    ),
    "min_prefill_tok_s": _Gate("prefill speed", " tok/s", lambda q: q.prefill_tok_s, is_floor=True),
    "max_size_mib": _Gate("file size", " MiB", lambda q: q.size_mib.value),
}
_WHY_UNJUDGED = {
    "max_kld_p999_nats": f"fewer than {MIN_CHUNKS_FOR_TAIL} chunks were scored",
    "min_prefill_tok_s": "prefill was not measured at depth 0",
}


@dataclass(frozen=True)
class _Miss:
    """A limit that is not kept, and by how much of itself."""

    text: str
    excess: float


def _misses(quant: Trusted, gates: Gates) -> tuple[list[_Miss], list[str]]:
    """Return the limits that a quant misses, and those that nobody can judge."""
    missed: list[_Miss] = []
    unjudged: list[str] = []
    for name, limit in gates.model_dump(exclude_none=True).items():
        gate = _GATES[name]
        value = gate.read(quant)
        if value is None:
            unjudged.append(f"{name} cannot be judged: {_WHY_UNJUDGED[name]}")
        elif gate.is_floor and not value >= limit:
            missed.append(_Miss(_say_miss(gate, name, value, limit), limit / max(value, 1e-9) - 1))
        elif not gate.is_floor and not value <= limit:
            missed.append(_Miss(_say_miss(gate, name, value, limit), value / limit - 1))
    return missed, unjudged


def _say_miss(gate: _Gate, name: str, value: float, limit: float) -> str:
    side = "under" if gate.is_floor else "over"
    return (
        f"{gate.words} {wording.beyond(value, limit)}{gate.unit} is {side} "
        f"the limit {wording.declared(limit)} ({name})"
    )


def _memory_miss(quant: Trusted, slice_: ChooseSlice, host: str) -> list[_Miss]:
    """Say by how many MiB a quant exceeds a host; a host without a limit takes everything."""
    spec = slice_.hosts[host]
    limit = _memory_limit_mib(spec)
    if limit is None:
        return []
    needed = quant.memory_mib.value + spec.margin_mib
    if needed <= limit:
        return []
    # Rounded up, since "0 MiB over" would be no reason.
    text = (
        f"{wording.mib(math.ceil(needed - limit))} over the {wording.mib(limit)} of host {host} "
        f"at {wording.tokens(slice_.context_tokens)} tokens"
    )
    if spec.margin_mib:
        text += f", of which {wording.mib(spec.margin_mib)} stay free"
    return [_Miss(text, needed / limit - 1)]


def _memory_limit_mib(spec: Host) -> int | None:
    return spec.vram_mib if spec.vram_mib is not None else spec.memory_mib


# --- one host ---------------------------------------------------------------------------------


class _Election:
    """The choice for one host: who may stand, who wins, and what is said to everybody."""

    def __init__(
        self,
        slice_: ChooseSlice,
        host: str,
        evidence: Sequence[Evidence],
        dominators: Mapping[str, str],
        incumbent: str | None,
    ) -> None:
        self.slice = slice_
        self.host = host
        self.evidence = evidence
        self.dominators = dominators
        self.incumbent = incumbent
        self.metric, self.order = _OBJECTIVES[slice_.objective]
        self.doubts = {one.type: one.reason for one in evidence if isinstance(one, Doubted)}
        self.missed: dict[str, list[_Miss]] = {}
        self.passing: list[Trusted] = []
        self._judge()
        self.winner = self._best(self.passing, incumbent)
        rest = [one for one in self.passing if one is not self.winner]
        self.runner_up = self._best(rest, incumbent)

    def _judge(self) -> None:
        for one in self.evidence:
            if isinstance(one, Doubted):
                continue
            missed, unjudged = _misses(one, self.slice.gates)
            missed += _memory_miss(one, self.slice, self.host)
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
            limit_mib=_memory_limit_mib(spec),
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
        return f"{wording.listed(list(self.doubts))} cannot be judged"

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
            return f"in service, and no quant that passes is clearly {self._comparative()}"
        tie = f"the {len(field)} {self.metric.best} quants, which are equal within {self._effect()}"
        return f"the {self.order[0].best} of {tie}"

    def _effect(self) -> str:
        return f"{wording.declared(self.metric.effect(self.slice.choose) * 100)} % or the noise"

    def _figures(self, one: Trusted) -> str:
        return (
            f"{wording.number(one.decode_tok_s.value)} tok/s at depth "
            f"{wording.tokens(one.deepest_decode.depth_tokens)}, "
            f"{wording.number(one.kld_mean_nats.value)} nats, "
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
            return (
                f"Nothing binds: no limit keeps out a quant that is clearly {self._comparative()}."
            )
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
                key=one.key, type=one.type, gguf_sha256=None, size_mib=None, memory_mib=None,
                decode_tok_s=None, prefill_tok_s=None, kld_mean_nats=None, kld_p999_nats=None,
                same_top=None, ppl_ratio=None, bits_per_weight=None, verdict="INVALID",
                on_frontier=False, sentence=f"{one.type}: {one.reason}.",
            )  # fmt: skip
        quality = one.benchmark.quality
        return Candidate(
            key=one.key,
            type=one.type,
            gguf_sha256=one.quantized.gguf.sha256,
            size_mib=one.size_mib.value,
            memory_mib=one.memory_mib.value,
            decode_tok_s=one.decode_tok_s.value,
            prefill_tok_s=one.prefill_tok_s,
            kld_mean_nats=one.kld_mean_nats.value,
            kld_p999_nats=quality.kld_p999_nats,
            same_top=quality.same_top,
            ppl_ratio=quality.ppl_ratio,
            bits_per_weight=one.quantized.bits_per_weight,
            verdict=self._candidate_verdict(one),
            on_frontier=one.type not in self.dominators,
            sentence=f"{one.type}: {self._candidate_words(one)}.",
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
        tie = f"{self.metric.equal} {winner.type} within {self._effect()}"
        if winner.type == self.incumbent:
            return f"{tie}, and {winner.type} is in service"
        decisive = next((m for m in self.order if m.cost(one) != m.cost(winner)), None)
        if decisive is None:
            return f"equal to {winner.type} in every number"
        return f"{tie}, and {decisive.compare(one, winner)}"

    def _rank_by_metric(self, one: Trusted) -> tuple[float, str]:
        return self.metric.cost(one), one.type


# --- files ------------------------------------------------------------------------------------


def run(slice_: ChooseSlice, at: Layout) -> ChoiceRecord:
    """
    Choose among the declared quants of a model, whatever else lies in results/.

    Writes the rows of `dvc plots` and of `dvc metrics`. A record that is missing or unreadable is
    an INVALID candidate, not an error: the other quants of the model still get their verdict.
    """
    quantized = _read_all(slice_, at, "quantize", QuantizeRecord)
    measured = _read_all(slice_, at, "benchmark", BenchmarkRecord)
    incumbents, notes = committed_winners(slice_.model, at)
    choice = choose(slice_, quantized, measured, incumbents)
    candidates = choice.hosts[0].candidates if choice.hosts else ()
    shown = [one for one in candidates if one.verdict != "INVALID"]
    atomic.write_json(at.frontier(slice_.model), [_frontier_row(one) for one in shown])
    atomic.write_json(at.metrics(slice_.model), {one.type: _metrics_row(one) for one in shown})
    return choice.model_copy(update={"notes": notes})


def _read_all(
    slice_: ChooseSlice, at: Layout, stage: str, kind: type[records.R]
) -> dict[str, records.R | str]:
    return {
        key: _read(at.quant_record(stage, slice_.model, type_), kind)
        for key, type_ in slice_.quants.items()
    }


def _read(path: Path, kind: type[records.R]) -> records.R | str:
    """Return a record, or why there is none, without the directory that it should be in."""
    try:
        return records.read(path, kind)
    except RecordError as error:
        return error.message.replace(str(path), path.name).rstrip(".")
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def _frontier_row(one: Candidate) -> dict[str, str | float | bool | None]:
    return {
        "type": one.type,
        "size_mib": one.size_mib,
        "memory_mib": one.memory_mib,
        "decode_tok_s": one.decode_tok_s,
        "kld_mean_nats": one.kld_mean_nats,
        "on_frontier": one.on_frontier,
        "verdict": one.verdict,
    }


def _metrics_row(one: Candidate) -> dict[str, float]:
    names = (
        "decode_tok_s", "prefill_tok_s", "kld_mean_nats", "kld_p999_nats", "same_top", "ppl_ratio",
        "memory_mib", "size_mib",
    )  # fmt: skip
    values = ((name, getattr(one, name)) for name in names)
    return {name: value for name, value in values if value is not None}


def committed_winners(model: str, at: Layout) -> tuple[dict[str, str], tuple[str, ...]]:
    """
    Ask git what the last commit has in service on each host.

    A host that was not promoted then keeps what it had before.

    Returns:
        Type by host, and a note if there is an answer that cannot be used. No repository, no
        commit and no choice in it are ordinary: nothing is in service yet.
    """
    path = at.model_record("choose", model).relative_to(at.root).as_posix()
    unusable = "so no quant is kept for being in service"
    try:
        shown = proc.run(
            ["git", "show", f"HEAD:./{path}"],
            cwd=at.root,
            log=at.log("choose", model),
            env={"LC_ALL": "C"},
            ok_codes=(0, _GIT_EXIT_ABSENT),
        )
    except MachineError:
        return {}, (f"git is not installed, {unusable}.",)
    if shown.code == _GIT_EXIT_ABSENT:
        absent = any(words in shown.stderr for words in _GIT_SAYS_ABSENT)
        return {}, () if absent else (f"git could not read the last commit, {unusable}.",)
    try:
        last = ChoiceRecord.model_validate_json(shown.stdout)
    except ValueError:
        return {}, (f"The committed choice is not one of this version, {unusable}.",)
    in_service = {
        one.host: one.winner if one.verdict == "PROMOTE" else one.incumbent for one in last.hosts
    }
    return {host: type_ for host, type_ in in_service.items() if type_ is not None}, ()


__all__ = ["MIB", "MIN_CHUNKS_FOR_TAIL", "choose", "committed_winners", "run"]
