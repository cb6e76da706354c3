"""
The declared prompt regressions, asked at once: `fleet load-test MODEL --prompts`.

The stage asks them too. This is for somebody who writes one, or who wants to know what a running
server answers before it is trusted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines import load_session, measuring, prompts, records, regressions, toolchain
from pipelines.errors import ParamsError
from pipelines.load_examine import Examiner
from pipelines.load_remote import find
from pipelines.load_test import render_modelfile
from pipelines.serving import engine as engines
from pipelines.serving import server

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.load_records import RegressionResult
    from pipelines.load_remote import Wanted
    from pipelines.params import LoadTestSlice


def of_winner(wanted: LoadTestSlice, at: Layout) -> tuple[RegressionResult, ...]:
    """
    Serve the quant that the first host chose, and ask.

    Raises:
        ParamsError: Nothing is declared to ask, or no host chose a quant.
    """
    examiner = _examiner(wanted, at)
    choice = records.read(at.model_record("choose", wanted.model), records.ChoiceRecord)
    winner = next((host.winner for host in choice.hosts if host.winner is not None), None)
    if winner is None:
        raise ParamsError(f"no quant of {wanted.model} is chosen.", hint="fleet report")
    engine = engines.find(wanted.serving, toolchain.load(at), log=examiner.log)
    with (
        # Answers do not depend on it, but a benchmark beside us would.
        measuring.one_at_a_time(
            toolchain.default_cache_root(), f"{wanted.model}, prompt regressions"
        ),
        server.open_host(
            engine, examiner.settings, model=wanted.model, at=at, log=examiner.log
        ) as host,
        host.load(examiner.file(winner)) as loaded,
    ):
        results = examiner.regressions(examiner.session(loaded))
        loaded.verify()
    return results


def of_server(wanted: LoadTestSlice, remote: Wanted, at: Layout) -> tuple[RegressionResult, ...]:
    """
    Ask a running server.

    Raises:
        ParamsError: Nothing is declared to ask, or the server does not have the model.
        RetryLaterError: Nothing answers there.
    """
    examiner = _examiner(wanted, at)
    found = find(remote)
    session = load_session.opened(
        url=found.url,
        api=found.api,
        name=found.name,
        declared=wanted.load_test,
        slos=wanted.slos,
        corpus=(at.root / wanted.corpus.path).read_text(encoding="utf-8"),
        context_tokens=wanted.context_tokens,
        log=examiner.log,
    )
    return examiner.regressions(session)


def _examiner(wanted: LoadTestSlice, at: Layout) -> Examiner:
    declared = prompts.load(at.prompts)
    if not regressions.of_model(declared, wanted.model):
        raise ParamsError(
            f"{at.prompts.relative_to(at.root)} declares no `regressions` for {wanted.model}.",
            hint="corpora/README.md says what one looks like.",
        )
    hardware = measuring.this_machine(at)
    return Examiner(
        wanted=wanted,
        at=at,
        prompts=declared,
        modelfile=render_modelfile(wanted, at),
        threads=wanted.threads or hardware["cpu"]["cores_count"],
    )
