"""What a load test means for a host, in one verdict and one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import record_factory as make

from pipelines import load_verdict
from pipelines.load_records import GoldenPrompt
from pipelines.records import HostChoice

if TYPE_CHECKING:
    from pipelines.load_records import LoadVerdict

GOOD = "200 of 200 requests kept every level"


def chosen(**changes: Any) -> HostChoice:
    """Return a host that chose Q4_K_M."""
    fields: dict[str, Any] = {
        "host": "local", "limit_mib": 4096, "margin_mib": 1024, "incumbent": None,
        "winner": "Q4_K_M", "runner_up": None, "verdict": "PROMOTE", "sentence": "promote Q4_K_M",
        "binding": "", "candidates": (),
    }  # fmt: skip
    return HostChoice(**(fields | changes))


def said(
    host: HostChoice | None = None, *, engine: Any = None, smokes: Any = (), **of_test: Any
) -> LoadVerdict:
    """Judge one winner whose parts all went well but for what is changed."""
    fields = {"gates": (make.load_gate(sentence=GOOD),)} | of_test
    return load_verdict.of_host(
        host or chosen(), (make.winner_test(**fields),), smokes, engine or make.engine_id()
    )


def test_what_kept_every_level_is_promoted_with_its_goodput_as_the_reason() -> None:
    """One sentence that a person can check."""
    found = said()

    assert (found.verdict, found.sentence) == ("PROMOTE", GOOD)


def test_a_host_that_chose_nothing_keeps_the_verdict_of_the_choice() -> None:
    """There is no file that a load test could speak of."""
    found = said(chosen(winner=None, verdict="REJECT"))

    assert (found.verdict, found.winner) == ("REJECT", None)
    assert found.sentence == "nothing was chosen, so nothing was served"


def test_doubt_beats_failure_beats_an_open_question() -> None:
    """Numbers that are not to be trusted refute nothing."""
    missed = make.load_gate("ttft", outcome="FAIL", sentence="12 of 200 requests had it")
    opened = make.load_gate("goodput", outcome="INCONCLUSIVE", sentence="190 of 200 kept it")

    assert said(gates=(opened,)).verdict == "HOLD"
    assert said(gates=(opened, missed)).verdict == "REJECT"
    assert said(gates=(opened, missed), invalid=("the client was too slow",)).verdict == "INVALID"
    assert said(gates=(missed,)).sentence == "12 of 200 requests had it"


def test_a_wrong_prompt_rejects_however_fast_the_server_is() -> None:
    """The first conversation that differs is named."""
    wrong = make.golden(
        prompts=(
            GoldenPrompt(id="plain", outcome="PASS", sentence="Equal."),
            GoldenPrompt(id="system", outcome="FAIL", sentence="Ollama renders another text."),
        )
    )
    found = said(golden=wrong)

    assert found.verdict == "REJECT"
    assert "(system)" in found.sentence
    assert "Ollama renders another text" in found.sentence


@pytest.mark.parametrize(("outcome", "verdict"), [("FAIL", "REJECT"), ("INCONCLUSIVE", "HOLD")])
def test_degenerate_answers_beyond_those_of_f16_stop_a_promotion(
    outcome: str, verdict: str
) -> None:
    """Perplexity does not show them."""
    found = said(degenerate=make.degenerate(outcome=outcome, sentence="7 answers loop"))

    assert (found.verdict, found.sentence) == (verdict, "7 answers loop")


def test_another_quant_of_the_release_that_fails_its_smoke_holds_it() -> None:
    """It would be published with the winner."""
    broken = make.smoke("Q2_K", outcome="FAIL", sentence="it cannot be loaded")
    found = said(smokes=(broken,))

    assert (found.verdict, found.sentence) == ("HOLD", "Q2_K: it cannot be loaded")


def test_an_engine_that_stands_in_holds_and_says_what_to_declare() -> None:
    """What it measured is real, but it is not what will serve."""
    found = said(engine=make.engine_id(kind="llama-server", declared=False))

    assert found.verdict == "HOLD"
    assert "`serving.engine: llama-server`" in found.sentence


def test_a_test_by_which_nothing_was_judged_promotes_nothing() -> None:
    """A gate that is not there is not passed."""
    found = said(gates=())

    assert (found.verdict, found.sentence) == ("INVALID", "no level of host local was judged")


def test_the_levels_of_another_host_do_not_matter() -> None:
    """Each host has its own."""
    elsewhere = make.load_gate("ttft", host="laptop", outcome="FAIL", sentence="too slow")
    found = said(gates=(make.load_gate(sentence=GOOD), elsewhere))

    assert found.verdict == "PROMOTE"
