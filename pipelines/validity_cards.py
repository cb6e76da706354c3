"""
Rules of validity for NVIDIA cards: who used them, what slowed them down, what changed, what broke.

Sources: the NVML API reference; nvmlClocksEventReasons in nvml.h; NVIDIA's list of Xid errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pipelines import wording
from pipelines.validity_findings import (
    MAX_SLOWDOWN_SHARE,
    Finding,
    limit_of,
    note,
    ok,
    over,
    unknown,
    void,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pipelines.gpu import Observation
    from pipelines.validity import Conditions

# Relative fall of the SM clock while the card became warmer by this much. Two RTX 3090 that went
# from cold to hot lost 20 % of their clock and 5.2 % of their speed (noonghunna/club-3090#178):
# half of that is about the smallest effect that is gated.
MAX_CLOCK_FALL: Final = 0.10
NOTED_HEATING_C: Final = 10.0


def _backend(seen: Conditions) -> Iterator[Finding]:
    """Check that the GPU worked, and that it is the one that the driver shows."""
    if seen.gpu_info is None:
        return
    info = seen.gpu_info.strip()
    if not info:
        yield void(
            "gpus_used_count",
            0,
            1,
            f"llama.cpp is built for {seen.backend} but used no GPU (at least 1): check the driver "
            "with `nvidia-smi` and CUDA_VISIBLE_DEVICES.",
        )
        return
    unknown = [card.name for card in seen.cards if card.name not in info]
    if unknown:
        yield void(
            "gpus_unused_count",
            len(unknown),
            0,
            f"The driver shows {', '.join(unknown)}, llama.cpp used {info} (limit: the same): set "
            "CUDA_VISIBLE_DEVICES to the cards to measure.",
        )
    else:
        yield ok("gpus_unused_count", 0, 0)


def _watched(seen: Conditions) -> Iterator[Finding]:
    if seen.gpu is not None and seen.gpu.samples_count:
        yield ok("card_samples_count", seen.gpu.samples_count, 1)
    elif seen.backend == "cuda":
        yield void(
            "card_samples_count",
            0,
            1,
            "Nothing watched the card (0 samples, at least 1): install the driver and "
            "nvidia-ml-py, so that other programs and slowdowns are seen.",
        )
    else:
        yield unknown(
            "card_samples_count",
            1,
            f"Nothing watches the cards of {seen.backend}: others may use them.",
        )


def _foreign(card: Observation) -> Iterator[Finding]:
    rule = ("foreign_programs_count", len(card.foreign), 0)
    if card.foreign:
        yield void(
            *rule,
            f"Other programs computed on the card: {wording.first_few(card.foreign)} "
            f"({len(card.foreign)}, limit 0). Stop them and run it again.",
        )
    else:
        yield ok(*rule)
    if not card.attributed:
        yield Finding(
            "attributed",
            "note",
            sentence="The driver does not show which process uses the card (a container?): memory "
            "is the growth of the whole card.",
        )


def _slowdowns(card: Observation) -> Iterator[Finding]:
    for reason, share in card.slowdowns.items():
        rule = (f"{reason.replace(' ', '_')}_share", share, MAX_SLOWDOWN_SHARE)
        if share > MAX_SLOWDOWN_SHARE:
            yield void(
                *rule,
                f"The card was slowed down ({reason}) in {over(share, MAX_SLOWDOWN_SHARE)} of the "
                f"run (limit {limit_of(MAX_SLOWDOWN_SHARE)}): let it cool, check fans and power, "
                "and run it again.",
            )
        else:
            yield ok(*rule)
    # A card at its power limit works as designed (an RTX 3090 in every prefill): told, not judged.
    yield ok("power_capped_share", card.power_capped, None)


def _clock(card: Observation) -> Iterator[Finding]:
    if card.clock_mhz is not None:
        heat = "" if card.temperature_c is None else f", {card.temperature_c} °C at most"
        yield Finding(
            "clock_mhz",
            "ok",
            card.clock_mhz,
            sentence=f"SM clock {card.clock_mhz:,.0f} MHz in the median{heat}.",
        )


def _drift(card: Observation) -> Iterator[Finding]:
    if card.clock_fall is None or card.heating_c is None:
        return
    fall, heating = card.clock_fall, card.heating_c
    rule = ("clock_fall", fall, MAX_CLOCK_FALL)
    if fall > MAX_CLOCK_FALL and heating > NOTED_HEATING_C:
        yield void(
            *rule,
            f"The SM clock fell by {over(fall, MAX_CLOCK_FALL)} (limit {limit_of(MAX_CLOCK_FALL)}) "
            f"while the card became {wording.number(heating, 2)} °C warmer: let it warm up before "
            "the run, improve its cooling, or fix its clock with `nvidia-smi -lgc`.",
        )
    else:
        yield ok(*rule)
    heated = ("heating_c", heating, NOTED_HEATING_C)
    if heating > NOTED_HEATING_C:
        yield note(
            *heated, f"The card became {wording.number(heating, 2)} °C warmer during the run."
        )
    else:
        yield ok(*heated)


def _temperature(card: Observation) -> Iterator[Finding]:
    margin = card.temperature_margin_c
    if margin is None:
        return
    if margin <= 0:
        yield void(
            "temperature_margin_c",
            margin,
            1,
            f"The card reached the temperature at which it slows down ({margin} °C below it, at "
            "least 1): let it cool, check its fans, and run it again.",
        )
    else:
        yield ok("temperature_margin_c", margin, 1)


def _power_limit(seen: Conditions) -> Iterator[Finding]:
    """The limit that is in force decides the speed; it has to be that of the hardware id."""
    if seen.gpu is None:
        return
    named = [card.power_limit_w for card in seen.cards]
    changed = 0
    for number, limits in enumerate(seen.gpu.power_limits_w):
        # What the hardware id names comes first; a card that it does not know is judged by itself.
        identified = named[number] if len(named) == len(seen.gpu.power_limits_w) else None
        every = (*(() if identified is None else (identified,)), *limits)
        if len(set(every)) > 1:
            changed += 1
            yield void(
                "power_limit_changes_count",
                len(set(every)) - 1,
                0,
                f"The power limit of card {number} was {wording.listed(_watts(every))} (limit: no "
                "change): set it once with `nvidia-smi -pl`, and run it again.",
            )
    if not changed and any(seen.gpu.power_limits_w):
        yield ok("power_limit_changes_count", 0, 0)


def _watts(limits: Sequence[int]) -> list[str]:
    return [f"{limit} W" for limit in dict.fromkeys(limits)]


def _errors(card: Observation) -> Iterator[Finding]:
    """Memory and driver: one error in the run is one too many, since nobody knows what it hit."""
    for rule, count, what, advice in (
        (
            "ecc_errors_count",
            card.ecc_errors_count,
            "The card's memory had {} that it could not correct",
            "numbers can be wrong; look at `nvidia-smi -q -d ECC`, and replace the card",
        ),
        (
            "retired_count",
            card.retired_count,
            "The card took {} of its memory out of use",
            "look at `nvidia-smi -q -d ROW_REMAPPER`, reset the card, and run it again",
        ),
    ):
        noun = "error" if rule == "ecc_errors_count" else "part"
        if count is None:
            continue
        if count > 0:
            yield void(
                rule,
                count,
                0,
                f"{what.format(wording.counted(count, noun))} (limit 0): {advice}.",
            )
        else:
            yield ok(rule, count, 0)
    rule = "xids_count"
    if card.xids:
        numbers = ", ".join(map(str, dict.fromkeys(card.xids)))
        yield void(
            rule,
            len(card.xids),
            0,
            f"The driver reported {wording.counted(len(card.xids), 'critical error')} (Xid "
            f"{numbers}; limit 0): look the number up in NVIDIA's list of Xid errors and in "
            "`dmesg`, and run it again when its cause is gone.",
        )
    else:
        yield ok(rule, 0, 0)


def _lost(card: Observation) -> Iterator[Finding]:
    if card.lost:
        yield void(
            "cards_lost_count",
            1,
            0,
            "A card stopped answering its driver during the run (1 lost, limit 0): look at "
            "`dmesg`, reset or restart the machine, and run it again.",
        )
    else:
        yield ok("cards_lost_count", 0, 0)


def _link(card: Observation) -> Iterator[Finding]:
    share = card.pcie_lanes_share
    if share is None:
        return
    if share < 1:
        yield note(
            "pcie_lanes_share",
            share,
            1,
            f"The card used {wording.percent(share)} of the PCIe lanes that it and its slot have: "
            "loading and parts of the model on the CPU are slower.",
        )
    else:
        yield ok("pcie_lanes_share", share, 1)


def _setup(card: Observation) -> Iterator[Finding]:
    if card.display:
        yield Finding(
            "display",
            "note",
            sentence="A screen hangs on the card: what it shows takes memory and time.",
        )
    if card.persistence is False:
        yield Finding(
            "persistence",
            "note",
            sentence="Persistence mode is off: the first run after a pause starts with cold "
            "clocks; `nvidia-smi -pm 1` switches it on.",
        )


def _cards(rule: Callable[[Observation], Iterator[Finding]]) -> Callable[..., Iterator[Finding]]:
    """Apply a rule where something watched the cards."""

    def applied(seen: Conditions) -> Iterator[Finding]:
        if seen.gpu is not None and seen.gpu.samples_count:
            yield from rule(seen.gpu)

    return applied


RULES: Final = (
    _backend,
    _watched,
    _cards(_lost),
    _cards(_foreign),
    _cards(_slowdowns),
    _power_limit,
    _cards(_temperature),
    _cards(_drift),
    _cards(_clock),
    _cards(_errors),
    _cards(_link),
    _cards(_setup),
)
