"""
What `fleet load-test` does besides the stage: a running server, prompt regressions, a sweep.

None of it writes the record of the stage, and nothing is promoted by it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

from pipelines import console, params
from pipelines.errors import GateError, ParamsError
from pipelines.wording import did_you_mean, quoted

if TYPE_CHECKING:
    import argparse

    from pipelines.layout import Layout
    from pipelines.load.plan import Api
    from pipelines.load_remote import Wanted
    from pipelines.params import Declaration, LoadTestSlice


def main(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    """
    Do what the options ask for; with `--json` the result goes to stdout as JSON.

    Raises:
        ParamsError: Two of the options at once, or a model that is not declared.
        GateError: A level of a running server was missed, or a regression was found.
    """
    chosen = [name for name in ("prompts", "sweep") if getattr(args, name)]
    if len(chosen) > 1 or (args.url and args.sweep):
        raise ParamsError("`--sweep` goes with neither `--prompts` nor `--url`.")
    if args.prompts:
        return _prompts(declared, at, args)
    if args.sweep:
        return _sweep(_slice(declared, at, args.key), at, as_json=args.json)
    return _remote(declared, at, args)


def _slice(declared: Declaration, at: Layout, model: str) -> LoadTestSlice:
    if model not in declared.models:
        raise ParamsError(
            f"model {quoted(model)} is not declared in {at.params}"
            f"{did_you_mean(model, declared.models) or '.'}",
            hint=f"Declared: {', '.join(declared.models)}.",
        )
    return params.load_test_slice(declared, model)


def _wanted(args: argparse.Namespace) -> Wanted:
    from pipelines import load_remote  # noqa: PLC0415 - requests

    return load_remote.Wanted(
        url=args.url,
        api=None if args.api == "auto" else cast("Api", args.api),
        name=args.name,
        key=args.key,
    )


def _remote(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import load_remote, render_load  # noqa: PLC0415 - requests

    log = at.log("load-test", "remote")
    log.unlink(missing_ok=True)
    tested = load_remote.drive(_wanted(args), declared, at, log=log)
    if args.json:
        console.out(tested.model_dump_json(indent=2))
    else:
        console.out(render_load.remote(tested))
    missed = [gate.sentence for gate in tested.gates if gate.outcome == "FAIL"]
    if tested.invalid:
        raise GateError(f"INVALID: {'; '.join(tested.invalid)}")
    if not tested.gates:
        raise GateError("it answered no request of the ladder, and no level was judged.")
    if missed:
        raise GateError(f"a level is missed: {'; '.join(missed)}.")
    return 0


def _prompts(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    """
    Ask the declared prompt regressions: of the chosen quant, served privately, or of a server.

    Raises:
        ParamsError: The model has none.
        GateError: One of them failed.
    """
    from pipelines import load_prompts, render_load  # noqa: PLC0415 - the serving side

    wanted = _slice(declared, at, args.key)
    if args.url:
        remote = _wanted(args)
        results = load_prompts.of_server(wanted, remote, at)
    else:
        results = load_prompts.of_winner(wanted, at)
    if args.json:
        console.out(json.dumps([json.loads(one.model_dump_json()) for one in results], indent=2))
    else:
        console.out(render_load.regressions(results))
    failed = [one.id for one in results if one.outcome == "FAIL"]
    if failed:
        raise GateError(f"prompt regressions failed: {', '.join(failed)}.")
    return 0


def _sweep(wanted: LoadTestSlice, at: Layout, *, as_json: bool) -> int:
    from pipelines import load_sweep, render_load  # noqa: PLC0415 - the serving side

    swept = load_sweep.run(wanted, at)
    if as_json:
        console.out(json.dumps([json.loads(one.model_dump_json()) for one in swept], indent=2))
    elif swept:
        console.out("\n\n".join(map(render_load.sweep, swept)))
        console.info("`fleet repro` puts it into the choice.")
    return 0
