"""
What a verdict asks beside the chain of digests: proof, task evals, comparison, licence, terms.

Each function is given everything that is known of a model and yields reasons; what only has to be
shown goes to `notes`. Nothing here reads a file or a clock.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, get_args

from pipelines import harm, stats_paired, wording
from pipelines.evaluate_records import EvaluateRecord
from pipelines.records import ChoiceRecord, ConvertRecord, FetchRecord, QuantizeRecord
from pipelines.release_records import Release, ReleaseWaiver, release_bytes, release_id, short
from pipelines.verdict_chain import is_trusted
from pipelines.verdict_words import Reason, capital, differing, tidy
from pipelines.verify_records import Layer, VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.compare_records import CompareRecord, Outcome
    from pipelines.evaluate_records import EvalResult, QuantEval
    from pipelines.params import JudgeSlice, Objective, Waivable
    from pipelines.records import HostChoice
    from pipelines.verdict_evidence import Evidence
    from pipelines.verdict_words import Rule, Verdict
    from pipelines.verify_records import Check

LAYERS: Final = get_args(Layer)
# From good to bad; equal is no worse than better.
OUTCOMES: Final[tuple[Outcome, ...]] = ("better", "equal", "undecided", "worse")
# By which the Hub says that it does not say.
UNKNOWN_LICENSES: Final = frozenset({"", "other", "unknown"})
# Texts that a licence may consist of; the name alone decides, as upstream spells it.
_LICENSE_WORDS: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING")


class Rules:
    """The rules about one model; `notes` fills with what does not change the verdict."""

    def __init__(self, evidence: Evidence) -> None:
        """Hold what is known."""
        self.evidence = evidence
        self.declared = evidence.declared
        self.model = evidence.declared.model
        self.again = f"Run `fleet repro {self.model}`"
        self.notes: list[str] = []

    # --- the conversion -----------------------------------------------------------------------

    def verify(self) -> Iterator[Reason]:
        """Yield why it is not proven that the 16-bit GGUF is the model of its source."""
        found, file = self.evidence.verified, "verify.json"
        if isinstance(found, str):
            clause = f"the conversion is not proven ({tidy(found)})"
            yield self._reason("verify", "INVALID", clause, ("no record", "every layer PASS", file))
            return
        yield from self._foreign_proof(found)
        failed = [check for check in found.checks if check.outcome == "FAIL"]
        for check in failed:
            yield self._failed_layer(check)
        if found.outcome == "FAIL" and not failed:
            clause = "the conversion fails its proof, and no layer says why"
            yield self._reason("verify", "REJECT", clause, ("FAIL", "PASS", file))
        if found.outcome == "FAIL" or failed:
            return
        passed = {check.layer for check in found.checks if check.outcome == "PASS"}
        skipped = [check for check in found.checks if check.outcome == "SKIP"]
        unseen = [
            layer for layer in LAYERS if layer not in passed | {each.layer for each in skipped}
        ]
        if unseen:
            clause = f"the proof of the conversion lacks {wording.listed(list(unseen))}"
            value = f"{len(LAYERS) - len(unseen)} layers"
            yield self._reason("verify", "INVALID", clause, (value, f"{len(LAYERS)} layers", file))
        elif not passed:
            clause = "the proof of the conversion passed no layer: all were skipped"
            yield self._reason("verify", "INVALID", clause, ("0 layers", "1 layer or more", file))
        elif "logits" in passed and found.logits is None and found.embeddings is None:
            # Nobody knows over which text, so that it may be another one than is declared.
            clause = "the proof of the conversion calls layer logits PASS without a number"
            yield self._reason("verify", "INVALID", clause, ("no number", "agreement", file))
        self.notes += [
            f"The proof of the conversion left out {check.layer}: "
            f"{wording.clause(tidy(check.sentence))}"
            for check in skipped
        ]
        is_shown = any(check.layer == "logits" for check in skipped)
        if self.declared.logits == "off" and not is_shown:
            self.notes.append(
                "The logits of upstream's own implementation are not compared (verify.logits: off)"
            )

    def _foreign_proof(self, found: VerifyRecord) -> Iterator[Reason]:
        fetched, converted = self.evidence.fetched, self.evidence.converted
        claims: list[tuple[str, object, object]] = [
            ("model", found.model, self.model),
            ("revision", found.revision, self.declared.revision),
            ("recipe", found.recipe, self.declared.recipe),
        ]
        if isinstance(fetched, FetchRecord):
            claims.append(("revision", found.revision, fetched.revision))
        if isinstance(converted, ConvertRecord):
            claims += [
                ("f16 sha256", found.f16_sha256, converted.gguf.sha256),
                ("llama.cpp commit", found.llama_cpp_commit, converted.llama_cpp_commit),
                ("recipe", found.recipe, converted.recipe),
            ]
        claims += [
            ("held-out text", each.corpus_sha256, self.declared.corpus_sha256)
            for each in (found.logits, found.embeddings)
            if each is not None
        ]
        yield from self._foreign("verify", "verify.json", claims)

    def _failed_layer(self, check: Check) -> Reason:
        first = f" ({tidy(check.findings[0])})" if check.findings else ""
        said = wording.clause(tidy(check.sentence))
        return self._reason(
            "verify",
            "REJECT",
            f"the conversion is not the model: layer {check.layer} fails: {said}{first}",
            (f"FAIL, {check.differing_count:,} differ", "PASS", "verify.json"),
            f"Read results/{self.model}/verify.json, pin another revision or another toolchain, "
            f"and run `fleet repro {self.model}`",
        )

    # --- task evals ---------------------------------------------------------------------------

    def evals(self) -> Iterator[Reason]:
        """Yield why the declared sets say nothing; which quant is harmed, `harm_of` says."""
        found, file, wanted = self.evidence.evaluated, "evaluate.json", self.declared.evals
        if isinstance(found, str):
            if wanted:
                clause = f"the declared evals were not done ({tidy(found)})"
                value = (f"0 of {wording.counted(len(wanted), 'set')}", "every set", file)
                yield self._reason("evaluate", "INVALID", clause, value)
            return
        if not wanted and not found.sets:
            return
        claims: list[tuple[str, object, object]] = [
            ("model", found.model, self.model),
            ("recipe", found.recipe, self.declared.recipe),
            ("level (evaluate.alpha)", found.alpha, self.declared.alpha),
        ]
        converted = self.evidence.converted
        if isinstance(converted, ConvertRecord):
            claims += [
                ("f16 sha256", found.f16_sha256, converted.gguf.sha256),
                ("llama.cpp commit", found.llama_cpp_commit, converted.llama_cpp_commit),
            ]
        yield from self._foreign("evaluate", file, claims)
        done = {one.name: one.set_sha256 for one in found.sets}
        if done != wanted or len(found.sets) != len(done):
            clause = "evaluate.json is of other sets than are declared"
            due = ", ".join(sorted(wanted)) or "no set"
            had = ", ".join(sorted(done)) or "no set"
            value = (had if had != due else f"{had}, of other bytes", due, file)
            yield self._reason("evaluate", "INVALID", clause, value)
            return
        for one in found.sets:
            yield from self._eval_set(one)

    def _eval_set(self, one: EvalResult) -> Iterator[Reason]:
        by_type = {quant.type: quant for quant in one.quants}
        for type_ in self.declared.quants.values():
            built, done = self.evidence.quantized.get(type_), by_type.get(type_)
            if done is None:
                clause = f"eval {one.name} was not done with {type_}"
                value = ("no answers", f"{one.items_count:,} answers", "evaluate.json")
                yield self._reason("evaluate", "INVALID", clause, value)
                continue
            if isinstance(built, QuantizeRecord):
                claim = (f"{type_} (eval {one.name})", done.gguf_sha256, built.gguf.sha256)
                yield from self._foreign("evaluate", "evaluate.json", [claim])
            if not 0 <= done.p_value <= 1:
                clause = f"eval {one.name} of {type_} has an impossible p-value"
                value = (f"p = {done.p_value:g}", "0 to 1", "evaluate.json")
                yield self._reason("evaluate", "INVALID", clause, value)
        if one.is_void:
            self.notes.append(f"Eval {one.name} says nothing: {wording.clause(tidy(one.sentence))}")

    def harm_of(self, host: HostChoice) -> Iterator[Reason]:
        """Yield each set that proves the winner of a host worse than f16."""
        found, built = self.evidence.evaluated, self.evidence.quantized.get(host.winner or "")
        if not isinstance(found, EvaluateRecord) or not isinstance(built, QuantizeRecord):
            return
        for one, quant in harm.found(found, built.type, built.gguf.sha256):
            yield self._reason(
                "evaluate",
                "REJECT",
                harm.clause(one, quant, found.alpha),
                (_p_value(quant), f"{wording.declared(found.alpha)} or more", "evaluate.json"),
                f"Choose again with `fleet repro {self.model}`; a quant with more bits or an "
                "importance matrix loses less",
                host=host.host,
            )

    # --- champion and challenger --------------------------------------------------------------

    def comparison_of(self, host: HostChoice) -> Iterator[Reason]:
        """Yield what the comparison says of the file that is chosen for a host."""
        found, file = self.evidence.compared, "compare.json"
        built = self.evidence.quantized.get(host.winner or "")
        if not isinstance(built, QuantizeRecord):
            return
        if isinstance(found, str):
            clause = f"the comparison cannot be read ({tidy(found)})"
            step = f"Remove results/{self.model}/compare.json, or run `fleet compare {self.model}`"
            value = ("unreadable", "a record of this version", file)
            yield self._reason("compare", "INVALID", clause, value, step, host=host.host)
            return
        stale = self._why_stale(found, built) if found else "nothing was compared"
        if found is None or stale:
            is_new = self._is_challenger(built)
            if found is not None:
                self.notes.append(f"The comparison does not count on host {host.host}: {stale}")
            elif is_new and not self.declared.compare_required:
                self.notes.append(
                    "It was not compared with the release that is served now: "
                    f"`fleet compare {self.model} --champion stable` does"
                )
            yield from self._required(host, built, stale)
            return
        yield from self._compared(host, found)
        if self._is_challenger(built) and not self._is_with_champion(found):
            other = f"it was compared with {tidy(found.champion.source)}"
            if not self.declared.compare_required:
                self.notes.append(
                    f"{capital(other)}, not with the release that is served now: "
                    f"`fleet compare {self.model} --champion stable` does that"
                )
            yield from self._required(host, built, other)

    def _compared(self, host: HostChoice, found: CompareRecord) -> Iterator[Reason]:
        """Yield what a comparison means that speaks of the chosen file."""
        file, step = "compare.json", f"Run `fleet compare {self.model}` on a quiet machine"
        if not is_trusted(found.validity):
            why = wording.clause(tidy((*found.validity.reasons, "no reason is given")[0]))
            clause = f"the comparison is INVALID: {why}"
            value = ("INVALID", "VALID", file)
            yield self._reason("compare", "INVALID", clause, value, step, host=host.host)
            return
        declared = self.declared
        outcome = binding_outcome(found, declared)
        if is_exchange(found):
            self.notes.append(exchange_words(found, declared.objective))
        said = wording.clause(tidy(found.sentence))
        if outcome != found.outcome:
            said = (
                f"its own numbers say so by the limits that are declared now, and its record says "
                f"{found.outcome}: {said}"
            )
        if outcome is None:
            clause = "the comparison measured nothing"
            value = ("no test", "a test", file)
            yield self._reason("compare", "INVALID", clause, value, step, host=host.host)
        elif outcome in {"worse", "undecided"}:
            is_worse = outcome == "worse"
            yield self._reason(
                "compare",
                "REJECT" if is_worse else "HOLD",
                f"against {tidy(found.champion.source)} ({tidy(found.champion.type)}) it is "
                f"{outcome}: {said}",
                (outcome, "better or equal", file),
                f"Leave `stable` where it is, or change the quant and run `fleet compare "
                f"{self.model}`"
                if is_worse
                else f"{step}; more pairs (compare.pairs) decide",
                host=host.host,
            )

    def _why_stale(self, found: CompareRecord, built: QuantizeRecord) -> str:
        """Say why a comparison does not speak of the chosen file here, as a clause."""
        choice = self.evidence.choice
        hw_id = choice.hw_id if isinstance(choice, ChoiceRecord) else None
        claims: tuple[tuple[str, object, object], ...] = (
            ("of another model", found.model, self.model),
            ("of another file", found.challenger.gguf_sha256, built.gguf.sha256),
            ("at another context", found.context_tokens, self.declared.context_tokens),
            ("from other hardware", found.machine.hw_id, hw_id),
        )
        for what, had, due in claims:
            if had != due:
                shown, wanted = differing(str(had), str(due))
                return f"it is {what} ({shown}, not {wanted})"
        return ""

    def _required(self, host: HostChoice, built: QuantizeRecord, why: str) -> Iterator[Reason]:
        """Yield a HOLD where a comparison with what is served now is asked for."""
        if not self.declared.compare_required or not self._is_challenger(built):
            return
        yield self._reason(
            "compare",
            "HOLD",
            f"it was not compared with the release that is served now: {why} (compare.required)",
            ("no comparison", "a comparison with the champion", "compare.json"),
            f"Run `fleet compare {self.model} --champion stable`",
            host=host.host,
        )

    def _champions(self) -> frozenset[str]:
        """Return the GGUFs of the newest release; none where it is not what is served now."""
        previous = self.evidence.previous
        if not isinstance(previous, Release) or self._pinned() is not None:
            return frozenset()
        winners = {one.winner for one in previous.hosts.values()} | {previous.stable_quant}
        return frozenset(one.gguf_sha256 for one in previous.quants if one.type in winners)

    def _pinned(self) -> str | None:
        """Return the id to which `stable` is pinned, unless that is the newest release."""
        previous, stable = self.evidence.previous, self.declared.stable
        if stable == "latest":
            return None
        is_newest = isinstance(previous, Release) and release_id(release_bytes(previous)) == stable
        return None if is_newest else stable

    def _is_challenger(self, built: QuantizeRecord) -> bool:
        """
        Tell whether a file would take the place of another one.

        Of a release to which `stable` is pinned results/ hold no digest, so that any file counts
        as another one.
        """
        champions = self._champions()
        return self._pinned() is not None or (
            bool(champions) and built.gguf.sha256 not in champions
        )

    def _is_with_champion(self, found: CompareRecord) -> bool:
        """Tell whether a comparison was with what is served now."""
        pinned = self._pinned()
        if pinned is not None:
            return found.champion.source == f"release {short(pinned)}"
        return found.champion.gguf_sha256 in self._champions()

    # --- licence and access -------------------------------------------------------------------

    def access(self) -> Iterator[Reason]:
        """Yield what a person has to accept: a licence that nobody knows, and upstream's terms."""
        fetched = self.evidence.fetched
        if not isinstance(fetched, FetchRecord):
            return
        yield from self._license(fetched)
        if fetched.gated is not None:
            yield self._waivable(
                "gated",
                f"{tidy(fetched.source)} is gated ({fetched.gated}): upstream gives its files "
                "only to those who agreed to its terms",
                (f"gated: {fetched.gated}", "not gated", "fetch.json"),
                "Keep it out of registries that others read",
            )

    def license(self) -> str:
        """Return the licence of a release: as upstream states it, or as it is declared."""
        fetched = self.evidence.fetched
        stated = (fetched.license or "") if isinstance(fetched, FetchRecord) else ""
        known = stated.lower() not in UNKNOWN_LICENSES
        return stated if known else (self.declared.license or "other")

    def _license(self, fetched: FetchRecord) -> Iterator[Reason]:
        """Yield why nobody has accepted the licence."""
        declared, stated = self.declared.license, fetched.license or ""
        key = f"models.{self.model}.license"
        known = stated.lower() not in UNKNOWN_LICENSES
        remedy = f"Read it and declare what you accept as {key}"
        if not known and declared is None:
            value = (f"licence {stated or 'none'}", f"one that {key} accepts", "fetch.json")
            yield self._waivable("license", "Upstream states no licence", value, remedy)
            return
        if known and declared is not None and declared != stated:
            clause = f"{key} accepts {declared}, but upstream states {tidy(stated)}"
            yield self._waivable("license", clause, (stated, declared, "fetch.json"), remedy)
            return
        clause, is_of_name = self._license_change(fetched)
        # A declared name that upstream confirms says that somebody has read this one. Where
        # upstream has none, the declared one says nothing about a text that changed.
        if clause and not (declared is not None and (known or is_of_name)):
            value = (f"licence {stated or 'none'}", "the accepted one", "release.json")
            yield self._waivable("license", clause, value, remedy)

    def _license_change(self, fetched: FetchRecord) -> tuple[str, bool]:
        """
        Say how the licence is another one than was accepted, and whether by its name.

        What was let pass was not accepted: the waiver of the release before does not end by being
        used, or equal records would give another release the second time, without a word of it.
        """
        previous, license_ = self.evidence.previous, self.license()
        if not isinstance(previous, Release):
            return "", False
        if previous.license.id != license_:
            was, now = tidy(previous.license.id), tidy(license_)
            return f"The licence has changed from {was} to {now} since the release before", True
        if previous.license.files != license_files(fetched):
            return "The text of the licence has changed since the release before", False
        waived = next((each for each in previous.waivers if each.gate == "license"), None)
        if waived is None:
            return "", False
        said = f"The licence was let pass by {tidy(waived.who)} for the release before"
        return f"{said}, and nobody has accepted it since", False

    # --- what a person lets pass --------------------------------------------------------------

    def waiver(self, gate: Waivable) -> ReleaseWaiver | None:
        """Return the waiver of a gate that counts today."""
        for one in self.declared.waivers:
            if one.gate == gate and one.until >= self.evidence.today:
                return ReleaseWaiver(gate=one.gate, who=one.who, why=one.why, until=one.until)
        return None

    def waivable(self, gate: Waivable, remedy: str) -> tuple[str, str]:
        """Return who lets a gate pass (empty if nobody), and the next step if nobody does."""
        counting = self.waiver(gate)
        mine = [one for one in self.declared.waivers if one.gate == gate]
        over = f"The waiver of {mine[0].who} ended on {mine[0].until}. " if mine else ""
        either = f"{remedy}, or" if remedy else "Or"
        step = (
            f"{over}{either} let it pass with a waiver of gate `{gate}` in "
            f"models.{self.model}.waivers"
        )
        return (f"{counting.who} until {counting.until}" if counting else ""), step

    def _waivable(
        self, gate: Waivable, clause: str, found: tuple[str, str, str], remedy: str
    ) -> Reason:
        let_pass, step = self.waivable(gate, remedy)
        rule: Rule = "gated" if gate == "gated" else "license"
        return self._reason(rule, "HOLD", clause, found, step, let_pass=let_pass)

    # --- words --------------------------------------------------------------------------------

    def _reason(  # noqa: PLR0913 - the fields of a reason
        self,
        rule: Rule,
        verdict: Verdict,
        clause: str,
        found: tuple[str, str, str],
        next_step: str = "",
        *,
        host: str = "",
        let_pass: str = "",
    ) -> Reason:
        """Compose a reason; `found` is what was found, what was due, and the record."""
        value, limit, file = found
        return Reason(
            rule=rule,
            verdict=verdict,
            clause=clause,
            value=value,
            limit=limit,
            file=self.evidence.file(file),
            next_step=next_step or self.again,
            host=host,
            let_pass=let_pass,
        )

    def _foreign(
        self, rule: Rule, file: str, claims: list[tuple[str, object, object]]
    ) -> Iterator[Reason]:
        """Yield a reason for each (what, found, wanted) that differs, each `what` once."""
        said: set[str] = set()
        for what, found, wanted in claims:
            if found != wanted and what not in said:
                said.add(what)
                had, due = differing(str(found), str(wanted))
                clause = f"{file} is of another {what} ({had}, not {due})"
                yield self._reason(rule, "INVALID", clause, (f"{what} {had}", due, file))


def binding_outcome(found: CompareRecord, declared: JudgeSlice) -> Outcome | None:
    """Return the outcome that counts by what is declared now; see `outcome_of`."""
    return outcome_of(found, declared.compare_effects, declared.alpha, objective=declared.objective)


def is_exchange(found: CompareRecord) -> bool:
    """Tell whether a quant of another type takes the place of what runs: a trade, by intent."""
    return found.champion.type != found.challenger.type


# What a quant of another type may not lose: what the model's `objective` makes best.
_BINDING_TEST: Final[dict[Objective, str]] = {"speed": "decode", "quality": "quality"}
_BINDING_WORDS: Final[dict[Objective, str]] = {
    "speed": "decode speed binds",
    "quality": "divergence and the task evals bind",
    "size": "nothing of the comparison binds",
}


def exchange_words(found: CompareRecord, objective: Objective) -> str:
    """Say what a comparison of two types of quants decides."""
    return (
        f"{found.challenger.type} takes the place of {found.champion.type}: since the objective is "
        f"{objective}, {_BINDING_WORDS[objective]}; what else it costs is judged by the gates"
    )


def outcome_of(
    found: CompareRecord,
    effects: Mapping[str, float] | None = None,
    alpha: float | None = None,
    *,
    objective: Objective | None = None,
) -> Outcome | None:
    """
    Return the worst outcome of a comparison and of its parts; None if it has no part.

    Nothing that calls itself good is taken for better than its own numbers. Where the types of the
    two quants differ, and an objective is given, only what that makes best is held against the
    challenger: Q4_K_M is meant to diverge more than Q8_0, and the gates say how much it may.

    Args:
        found: The comparison.
        effects: Differences that matter now, of `decode`, `prefill` and `quality`; those of the
            record if None.
        alpha: Level below which lost items are no chance; not asked for if None.
        objective: That of the model; all parts bind if None.
    """
    trade = objective if is_exchange(found) else None
    only = None if trade is None else _BINDING_TEST.get(trade, "")
    due = effects or {}
    parts: list[Outcome] = []
    for one in found.speed:
        if one.is_gated and only in {None, one.test}:
            effect = due.get(one.test, one.effect)
            worst, best = math.log1p(-effect), math.log1p(effect)
            by_numbers = stats_paired.outcome_of(one.log_ratio_low, one.log_ratio_high, worst, best)
            parts.append(_worse_of(one.outcome, by_numbers))
    for item in found.flips if only in {None, "quality"} else ():
        is_lost = alpha is not None and not item.p_value >= alpha
        parts.append(_worse_of(item.outcome, "worse" if is_lost else "equal"))
    # Made from two conversions, the difference in divergence is information.
    quality = found.quality
    if quality is not None and quality.same_f16 and only in {None, "quality"}:
        effect = due.get("quality", quality.effect)
        by_numbers = stats_paired.outcome_of_rise(
            quality.log_ratio_low, quality.log_ratio_high, effect
        )
        most = max(quality.champion_kld_mean_nats, quality.challenger_kld_mean_nats)
        is_negligible = most < stats_paired.NEGLIGIBLE_NATS
        parts.append(_worse_of(quality.outcome, "equal" if is_negligible else by_numbers))
    if trade is not None and (parts or found.speed or found.quality):
        bound: list[Outcome] = ["equal", *parts]
        return max(bound, key=OUTCOMES.index)
    if not parts:
        return None
    return max((found.outcome, *parts), key=OUTCOMES.index)


def _worse_of(recorded: Outcome, by_numbers: Outcome) -> Outcome:
    """
    Return what is recorded, or what the numbers say where that is worse.

    What is recorded as undecided stays so: an interval that lies below its limit alone may have
    been held back by the correction for several tests.
    """
    if recorded in {"undecided", "worse"}:
        return recorded
    return max(recorded, by_numbers, key=OUTCOMES.index)


def license_files(fetched: FetchRecord) -> dict[str, str]:
    """Return the sha256 of each licence text that upstream ships, by name."""
    return {
        file.name: file.sha256
        for file in fetched.files
        if file.name.upper().split(".")[0] in _LICENSE_WORDS
    }


def _p_value(quant: QuantEval) -> str:
    return f"p = {wording.number(quant.p_value)}"
