"""What is sent, and when, is decided before the run, from a seed."""

from __future__ import annotations

import itertools
import stat
import statistics
from typing import TYPE_CHECKING, Any

import pytest
from test_load_dialects import prompt, target

from pipelines.load import plan

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
PROMPTS = tuple(prompt(str(number)) for number in range(12))


def cut(count: int = 20, seed: int = 1, tokens: int = 100, text: str = TEXT) -> list[str]:
    """Contents of prompts of the corpus."""
    prompts = plan.corpus_prompts(text, count, prompt_tokens=tokens, chars_per_token=4.0, seed=seed)
    assert all(len(each.messages) == 1 for each in prompts)
    return [each.messages[0]["content"] for each in prompts]


def test_the_same_seed_cuts_the_same_prompts() -> None:
    """And another one others."""
    assert cut(seed=1) == cut(seed=1)
    assert not set(cut(seed=1)) & set(cut(seed=2))


def test_no_two_prompts_begin_alike() -> None:
    """A cache of the server that knows the beginning of a prompt would answer too early."""
    starts = [each[:12] for each in cut(1000)]

    assert len(set(starts)) == 1000
    # Sorted, those that begin alike are neighbours.
    assert all(one[:10] != other[:10] for one, other in itertools.pairwise(sorted(starts)))


def test_prompts_have_about_the_declared_length() -> None:
    """Four characters a token here; the number before them takes a token for each digit."""
    assert {len(each) for each in cut(tokens=100)} == {(100 - 13) * 4 + 13}
    assert {len(each) for each in cut(tokens=1)} == {13 + 1}


def test_a_corpus_shorter_than_a_prompt_goes_round() -> None:
    """The text begins again where it ends."""
    assert all("dabcda" in each for each in cut(text="abcd"))


def test_an_empty_corpus_is_said() -> None:
    """Not a run of empty prompts."""
    with pytest.raises(plan.PlanError, match="corpus of the prompts is empty"):
        cut(text=" \n")


def test_a_salt_changes_only_what_a_prompt_begins_with() -> None:
    """A server that has kept an earlier test reads each prompt again, and as many tokens of it."""
    sizes: dict[str, Any] = {"prompt_tokens": 40, "chars_per_token": 4.0, "seed": 3}
    plain, salted = (
        [each.messages[0]["content"] for each in plan.corpus_prompts("some text " * 99, 5,
                                                                     **sizes, salt=salt)]
        for salt in (0, 12345)
    )  # fmt: skip

    assert [text[12:] for text in plain] == [text[12:] for text in salted]
    assert not {text[:12] for text in plain} & {text[:12] for text in salted}


def open_loop(rate_per_s: float = 10.0, seed: int = 1, warm_up: int = 2) -> plan.Plan:
    """Arrivals of ten of the prompts."""
    return plan.open_loop(
        "open",
        rate_per_s=rate_per_s,
        prompts=PROMPTS,
        warm_up_requests=warm_up,
        max_run_s=60,
        seed=seed,
    )


def test_arrivals_are_random_and_come_from_the_seed() -> None:
    """One for each prompt that counts, in order."""
    arrivals = open_loop().arrivals_s

    assert arrivals == open_loop().arrivals_s != open_loop(seed=2).arrivals_s
    assert len(arrivals) == 10 == open_loop().requests_count
    assert list(arrivals) == sorted(arrivals)


def test_pauses_between_arrivals_are_those_of_a_poisson_process() -> None:
    """Mean and deviation of exponential pauses are both 1 / rate."""
    many = plan.soak(
        "soak",
        rate_per_s=50.0,
        prompts=PROMPTS,
        warm_up_requests=2,
        max_run_s=200,
        seed=5,
    )
    pauses = [later - earlier for earlier, later in itertools.pairwise(many.arrivals_s)]

    assert statistics.mean(pauses) == pytest.approx(0.02, rel=0.05)
    assert statistics.stdev(pauses) == pytest.approx(0.02, rel=0.05)


def test_a_soak_lasts_its_time_and_uses_prompts_again() -> None:
    """The prompts of the warm-up are not among those."""
    soak = plan.soak(
        "soak", rate_per_s=20.0, prompts=PROMPTS, warm_up_requests=2, max_run_s=10, seed=1
    )

    assert 9 < soak.arrivals_s[-1] < 10
    assert soak.requests_count == len(soak.arrivals_s) > 100
    assert soak.prompts[:2] == PROMPTS[:2]
    assert set(map(id, soak.prompts[2:])) == set(map(id, PROMPTS[2:]))


def test_a_plan_of_nothing_is_refused() -> None:
    """No prompts beside the warm-up, no rate, no users: each is said before anything is sent."""
    with pytest.raises(plan.PlanError, match="no prompt is left after 12 of the warm-up"):
        open_loop(warm_up=12)
    with pytest.raises(plan.PlanError, match="arrivals in a second are none"):
        open_loop(rate_per_s=0.0)
    with pytest.raises(plan.PlanError, match="arrivals in a second are none"):
        open_loop(rate_per_s=float("nan"))
    with pytest.raises(plan.PlanError, match="0 virtual users"):
        plan.closed("x", concurrency=0, prompts=PROMPTS, warm_up_requests=0, max_run_s=1, seed=1)
    with pytest.raises(plan.PlanError, match="no prompt is left"):
        plan.soak("x", rate_per_s=1.0, prompts=(), warm_up_requests=0, max_run_s=1, seed=1)


def test_a_plan_survives_the_way_to_its_process(tmp_path: Path) -> None:
    """What is read there equals what was planned, and only we can read it."""
    file = tmp_path / "plan.json"

    plan.dump(open_loop(), target(), file)

    assert plan.load(file) == (open_loop(), target())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
