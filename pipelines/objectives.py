"""
What "better" means: the measured values that a choice compares, and who beats whom in them.

Speed first, below a ceiling on divergence: close to the original, divergence does not rank quants
(arXiv 2606.19558), while speed and memory are measured to a percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines import wording

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.evidence import Measured, Trusted
    from pipelines.params import Choose, Objective

# From here on a difference is told as a factor.
_FACTOR_FROM = 2


@dataclass(frozen=True)
class Metric:
    """
    One measured value, which way is better, and the words for it.

    Attributes:
        best: What the best one is, of all: `fastest`.
        worse: What another one is than it: `slower`.
        factor: What another one is, so many times, if it is far behind; empty where less is worse.
        equal: What another one is if neither is clearly better.
        unit: Unit of the value, where the value itself does not say.
        read: Reads the value, with its interval.
        effect: The least share of a difference that counts.
        more_is_better: Which way is better.
    """

    best: str
    worse: str
    factor: str
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
        a, b = self.read(one), self.read(other)
        is_apart = a.low > b.high if self.more_is_better else a.high < b.low
        return is_apart and self._leads(one, other, self.effect(effects))

    def overlap(self, one: Trusted, other: Trusted) -> bool:
        """Tell whether the intervals of two values have a point in common."""
        a, b = self.read(one), self.read(other)
        return a.low <= b.high and b.low <= a.high

    def within_effect(self, one: Trusted, other: Trusted, effects: Choose) -> bool:
        """Tell whether two values differ by no more than the minimum effect."""
        effect = self.effect(effects)
        return not self._leads(one, other, effect) and not self._leads(other, one, effect)

    def _leads(self, one: Trusted, other: Trusted, effect: float) -> bool:
        a, b = self.read(one).value, self.read(other).value
        return a * (1 - effect) > b if self.more_is_better else a * (1 + effect) < b

    def cost(self, one: Trusted) -> float:
        """Return the value such that less is better."""
        value = self.read(one).value
        return -value if self.more_is_better else value

    def compare(self, loser: Trusted, winner: Trusted) -> str:
        """
        Say how far behind one is: `31 % slower than Q4_K_M (412 against 598 tok/s)`.

        From twice as much on it is a factor, `20 times as divergent as`: nobody reads 1,900 %.
        """
        mine, best = self.read(loser).value, self.read(winner).value
        shown, shown_best = wording.pair(mine, best)
        unit = self.read(loser).unit or self.unit
        where = f" {speed_words(loser)}" if self is SPEED else ""
        figures = f"{shown} against {shown_best} {unit}{where}"
        return f"{self._lead(mine, best)} {winner.type} ({figures})"

    def _lead(self, mine: float, best: float) -> str:
        ratio = mine / best if best else math.inf
        if not math.isfinite(ratio):
            return f"{self.worse} than"
        if self.factor and ratio >= _FACTOR_FROM:
            return f"{wording.number(ratio, 2)} times {self.factor}"
        share = 1 - ratio if self.more_is_better else ratio - 1
        return f"{wording.percent(share)} {self.worse} than"


def speed_words(one: Trusted) -> str:
    """Say which speed counts, behind its unit: `at depth 4,096`, or `of prefill` of an encoder."""
    deepest = one.deepest_decode
    return f"at depth {wording.tokens(deepest.depth_tokens)}" if deepest else "of prefill"


SPEED = Metric(
    "fastest", "slower", "", "as fast as", "tok/s",
    lambda one: one.speed_tok_s, lambda effects: effects.min_speed_effect, more_is_better=True,
)  # fmt: skip
QUALITY = Metric(
    "least divergent", "more divergent", "as divergent as", "as close to f16 as", "",
    lambda one: one.divergence, lambda effects: effects.min_quality_effect,
)  # fmt: skip
SIZE = Metric(
    "smallest", "larger", "as large as", "as small as", "MiB",
    lambda one: one.size_mib, lambda effects: effects.min_size_effect,
)  # fmt: skip
MEMORY = Metric(
    "smallest in memory", "larger in memory", "as large in memory as", "as small in memory as",
    "MiB", lambda one: one.memory_mib, lambda effects: effects.min_size_effect,
)  # fmt: skip

# The metric that decides, then those that decide between equals, exactly.
OBJECTIVES: dict[Objective, tuple[Metric, tuple[Metric, ...]]] = {
    "speed": (SPEED, (QUALITY, SIZE, SPEED)),
    "quality": (QUALITY, (SPEED, SIZE, QUALITY)),
    "size": (SIZE, (QUALITY, SPEED, SIZE)),
}


def dominators(trusted: Sequence[Trusted], effects: Choose) -> dict[str, str]:
    """
    Name, for each quant off the Pareto front, one that makes it pointless.

    A quant dominates another if it is clearly worse in none of memory at the declared context,
    mean divergence and speed, and clearly better in at least one.
    """
    axes = (MEMORY, QUALITY, SPEED)

    def dominates(one: Trusted, other: Trusted) -> bool:
        return not any(axis.clearly_better(other, one, effects) for axis in axes) and any(
            axis.clearly_better(one, other, effects) for axis in axes
        )

    above = {one.type: [o for o in trusted if dominates(o, one)] for one in trusted}
    return {
        type_: min(those, key=lambda one: (bool(above[one.type]), QUALITY.cost(one), one.type)).type
        for type_, those in above.items()
        if those
    }
