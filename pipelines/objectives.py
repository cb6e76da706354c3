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


@dataclass(frozen=True)
class Metric:
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
            if self is SPEED
            else ""
        )
        return (
            f"{lead}{self.worse} than {winner.type} "
            f"({shown} against {shown_best} {self.unit}{depth})"
        )


SPEED = Metric(
    "fastest", "slower", "as fast as", "tok/s",
    lambda one: one.decode_tok_s, lambda effects: effects.min_speed_effect, more_is_better=True,
)  # fmt: skip
QUALITY = Metric(
    "least divergent", "more divergent", "as close to f16 as", "nats",
    lambda one: one.kld_mean_nats, lambda effects: effects.min_quality_effect,
)  # fmt: skip
SIZE = Metric(
    "smallest", "larger", "as small as", "MiB",
    lambda one: one.size_mib, lambda effects: effects.min_size_effect,
)  # fmt: skip
MEMORY = Metric(
    "smallest in memory", "larger in memory", "as small in memory as", "MiB",
    lambda one: one.memory_mib, lambda effects: effects.min_size_effect,
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
    mean divergence and decode speed, and clearly better in at least one.
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
