"""
What the generator sends, when and to whom: decided before it starts, from a seed.

    closed   so many virtual users, each with one request in flight and no pause between two. A
             server that stalls also stops their next requests, so a closed run says what a server
             can do, not what users of it get.
    open     arrivals of a Poisson process, fixed beforehand; a request is timed from its scheduled
             start, whether or not the server, or the client, was ready for it.
    soak     the same for a given time.

The first `warm_up_requests` prompts of a plan are sent before the run and are not counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from pipelines.errors import FleetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Of the number in front of a prompt.
NONCE_BITS: Final = 48

Api = Literal["ollama", "openai"]
# What a request asks for: an answer to a conversation, or the embedding of its last text.
Task = Literal["chat", "embed"]
Kind = Literal["closed", "open", "soak"]


class PlanError(FleetError):
    """A plan that cannot be sent."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    A model on a server, and what every request to it asks for.

    Attributes:
        url: Root of the server, without /api or /v1.
        api: Dialect that is spoken with it.
        model: Name that the server knows the model by.
        generate_tokens: Most tokens of an answer.
        timeout_s: Silence after which a request has failed.
        temperature: Of sampling; 0 takes the most likely token.
        seed: Of sampling.
        context_tokens: Context of a request; an answer to a prompt that fills it was cut. None
            where it is not known.
        task: What is asked for; an embedding has no length, temperature or seed.
    """

    url: str
    api: Api
    model: str
    generate_tokens: int
    timeout_s: float
    temperature: float
    seed: int
    context_tokens: int | None
    task: Task = "chat"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """
    One conversation to be answered.

    Attributes:
        messages: Each with `role` and `content`.
        tokens: Tokens that the server must read at least, if that is known: an answer to fewer was
            given to a cut conversation.
        tools: Functions that the model may call, as OpenAI's chat API spells them.
    """

    messages: tuple[dict[str, str], ...]
    tokens: int | None = None
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    One run.

    Attributes:
        name: For people.
        kind: See the module.
        concurrency: Virtual users of a closed run.
        rate_per_s: Mean arrivals in a second of the others.
        prompts: Of the warm-up, then of the requests that count.
        arrivals_s: Scheduled start of each counted request, from the start of the run; empty in a
            closed run.
        warm_up_requests: Prompts that warm up.
        max_run_s: Time after which nothing more is sent.
        seed: From which prompts and arrivals were drawn.
        keep_stamps: Keep the time of every chunk, not only of the first and last.
        ramp_s: Pause between the starts of two virtual users: their first requests would else
            queue for this client and not for the server.
    """

    name: str
    kind: Kind
    concurrency: int | None
    rate_per_s: float | None
    prompts: tuple[Prompt, ...]
    arrivals_s: tuple[float, ...]
    warm_up_requests: int
    max_run_s: float
    seed: int
    keep_stamps: bool = False
    ramp_s: float = 0.002

    @property
    def requests_count(self) -> int:
        """Requests that count."""
        return len(self.prompts) - self.warm_up_requests


def closed(  # noqa: PLR0913 - each is one independent fact about the run
    name: str,
    *,
    concurrency: int,
    prompts: Sequence[Prompt],
    warm_up_requests: int,
    max_run_s: float,
    seed: int,
    keep_stamps: bool = False,
) -> Plan:
    """
    Plan a run of virtual users that share the prompts, each sending its next when one is answered.

    Raises:
        PlanError: There is no prompt left after the warm-up, or no user.
    """
    if concurrency < 1:
        raise PlanError(f"{name}: {concurrency} virtual users send nothing.")
    return _checked(
        Plan(
            name=name,
            kind="closed",
            concurrency=concurrency,
            rate_per_s=None,
            prompts=tuple(prompts),
            arrivals_s=(),
            warm_up_requests=warm_up_requests,
            max_run_s=max_run_s,
            seed=seed,
            keep_stamps=keep_stamps,
        )
    )


def open_loop(  # noqa: PLR0913 - each is one independent fact about the run
    name: str,
    *,
    rate_per_s: float,
    prompts: Sequence[Prompt],
    warm_up_requests: int,
    max_run_s: float,
    seed: int,
    keep_stamps: bool = False,
) -> Plan:
    """
    Plan one random arrival for each prompt that is not of the warm-up.

    Raises:
        PlanError: There is no prompt left after the warm-up, or the rate is not positive.
    """
    count = len(prompts) - warm_up_requests
    return _checked(
        Plan(
            name=name,
            kind="open",
            concurrency=None,
            rate_per_s=rate_per_s,
            prompts=tuple(prompts),
            arrivals_s=_arrivals(name, rate_per_s, seed, count),
            warm_up_requests=warm_up_requests,
            max_run_s=max_run_s,
            seed=seed,
            keep_stamps=keep_stamps,
        )
    )


def soak(  # noqa: PLR0913 - each is one independent fact about the run
    name: str,
    *,
    rate_per_s: float,
    prompts: Sequence[Prompt],
    warm_up_requests: int,
    max_run_s: float,
    seed: int,
) -> Plan:
    """
    Plan random arrivals for `max_run_s`; the prompts are used again from the first if they end.

    A cache of the server holds the prompts of its slots, so a prompt is unknown again after as many
    others: give several times as many prompts as the server has slots.

    Raises:
        PlanError: There is no prompt left after the warm-up, or the rate is not positive.
    """
    arrivals = _arrivals(name, rate_per_s, seed, None, until_s=max_run_s)
    counted = prompts[warm_up_requests:]
    if not counted:
        raise PlanError(f"{name}: no prompt is left after {warm_up_requests} of the warm-up.")
    again = (counted[index % len(counted)] for index in range(len(arrivals)))
    return _checked(
        Plan(
            name=name,
            kind="soak",
            concurrency=None,
            rate_per_s=rate_per_s,
            prompts=(*prompts[:warm_up_requests], *again),
            arrivals_s=arrivals,
            warm_up_requests=warm_up_requests,
            max_run_s=max_run_s,
            seed=seed,
        )
    )


def _checked(plan: Plan) -> Plan:
    if plan.requests_count < 1:
        raise PlanError(
            f"{plan.name}: no prompt is left after {plan.warm_up_requests} of the warm-up."
        )
    return plan


def _arrivals(
    name: str, rate_per_s: float, seed: int, count: int | None, *, until_s: float = math.inf
) -> tuple[float, ...]:
    """Draw arrivals: pauses between them are exponential, so that they do not know each other."""
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise PlanError(f"{name}: {rate_per_s} arrivals in a second are none.")
    source = random.Random(seed)  # noqa: S311 - for repetition, not for secrecy
    arrivals: list[float] = []
    at = source.expovariate(rate_per_s)
    while (count is None or len(arrivals) < count) and (at < until_s or not arrivals):
        arrivals.append(at)
        at += source.expovariate(rate_per_s)
    return tuple(arrivals)


def corpus_prompts(  # noqa: PLR0913 - each is one independent fact about the prompts
    text: str,
    count: int,
    *,
    prompt_tokens: int,
    chars_per_token: float,
    seed: int,
    salt: int = 0,
) -> tuple[Prompt, ...]:
    """
    Cut prompts of about `prompt_tokens` out of a text, no two with a common start.

    The first words of each are a number drawn from the seed: a server that finds the start of a
    prompt in its cache skips the reading of it, and the time to first token would say nothing.

    Args:
        text: Corpus; repeated if it is shorter than a prompt.
        count: Number of prompts.
        prompt_tokens: Length of each, about; what it really is, the server counts.
        chars_per_token: Of this text, as the model tokenizes it.
        seed: Of slices and numbers.
        salt: Changes all numbers, and not the slices.

    Raises:
        PlanError: The text is empty.
    """
    if not text.strip():
        raise PlanError("The corpus of the prompts is empty.")
    source = random.Random(seed)  # noqa: S311 - for repetition, not for secrecy
    prompts = []
    for _ in range(count):
        nonce = f"{source.getrandbits(NONCE_BITS) ^ salt:012x} "
        # A number in hexadecimal takes about a token for each digit.
        length = max(1, round((prompt_tokens - len(nonce)) * chars_per_token))
        content = nonce + _slice(text, source.randrange(len(text)), length)
        prompts.append(Prompt(messages=({"role": "user", "content": content},)))
    return tuple(prompts)


def _slice(text: str, start: int, length: int) -> str:
    """Return `length` characters from `start`, going on at the beginning of the text."""
    times = (start + length) // len(text) + 1
    return (text * times)[start : start + length] if times > 1 else text[start : start + length]


# --- to the process that sends it -------------------------------------------------------------


def dump(plan: Plan, target: Target, path: Path) -> None:
    """Write what the generator's process reads; prompts are nobody else's business."""
    path.touch(mode=0o600)
    value = {"plan": dataclasses.asdict(plan), "target": dataclasses.asdict(target)}
    path.write_text(json.dumps(value))


def load(path: Path) -> tuple[Plan, Target]:
    """Read what `dump` wrote."""
    value: dict[str, Any] = json.loads(path.read_text())
    plan = value["plan"]
    plan["prompts"] = tuple(
        Prompt(messages=tuple(each["messages"]), tokens=each["tokens"], tools=tuple(each["tools"]))
        for each in plan["prompts"]
    )
    plan["arrivals_s"] = tuple(plan["arrivals_s"])
    return Plan(**plan), Target(**value["target"])
