"""
The verbs of a pull request's jobs, as the command line sees them: names, options, help.

What each does is in a module of its own, which is imported when it is typed. None reads params.yaml
here: each has its own word for a declaration that is wrong.
"""

from __future__ import annotations

from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.errors import ParamsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from pipelines.layout import Layout
    from pipelines.release_verbs import AddVerb

# What GitHub says of a job that another one needed.
_RESULTS = ("success", "failure", "cancelled", "skipped")


class Verb(NamedTuple):
    """A verb: its options, what it does in a checkout, and whether that needs params.yaml."""

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Layout, argparse.Namespace], int]
    is_declared: bool = True


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    add_verb: AddVerb,
    find: Callable[[], Layout],
    table: Iterable[Verb],
) -> None:
    """
    Add every verb of a table.

    Args:
        verbs: Of the command line.
        add_verb: Adds one.
        find: Returns the paths of the checkout that we stand in.
        table: The verbs.
    """
    for each in table:
        verb = add_verb(verbs, each.name, each.help, partial(_in_checkout, find, each))
        each.add_options(verb)


def _in_checkout(
    find: Callable[[], Layout],
    verb: Verb,
    args: argparse.Namespace,
) -> int:
    if not verb.is_declared and Path("dvc.yaml").exists():
        from pipelines.layout import Layout  # noqa: PLC0415 - not for --help

        return verb.run(Layout(), args)
    return verb.run(find(), args)


def words(values: list[str]) -> tuple[str, ...]:
    """Split what an action passes as one text, `a b`, and what a person types as several words."""
    return tuple(word for value in values for word in value.split())


# --- one pair for each verb: its options, and the call ----------------------------------------


def _plan_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--base",
        metavar="REV",
        help="commit to compare with; default: that of the pull request, or the default branch",
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="file for the plan")
    verb.add_argument("--json", action="store_true", help="print the plan as JSON")
    verb.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME",
        help="label of the pull request; `over-budget` lets a plan over its budget pass",
    )


def _plan(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import plan  # noqa: PLC0415 - not for --help

    return plan.main(at, base=args.base, out=args.out, as_json=args.json, labels=args.label)


def _bundle_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("models", nargs="+", metavar="MODEL", help="keys in params.yaml")
    verb.add_argument("--host", required=True, metavar="HOST", help="key in hosts: of params.yaml")
    verb.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the bundles")
    verb.add_argument(
        "--push",
        action=BooleanOptionalAction,
        default=False,
        help="send the GGUFs to the default remote of DVC; default: they stay here",
    )
    verb.add_argument(
        "--plan", type=Path, metavar="FILE", help="the plan; its commit is what was measured"
    )


def _bundle(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import bundle  # noqa: PLC0415 - not for --help

    return bundle.main(
        at,
        words(args.models),
        host=args.host,
        out=args.out,
        push=args.push,
        plan_file=args.plan,
    )


def _gate_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--plan", type=Path, required=True, metavar="FILE", help="by `fleet plan`")
    verb.add_argument(
        "--bundles", type=Path, required=True, metavar="DIR", help="by `fleet bundle`"
    )
    verb.add_argument("--out", type=Path, required=True, metavar="FILE", help="what was found")
    verb.add_argument(
        "--plan-result",
        choices=_RESULTS,
        default="success",
        help="how the planning job ended; default: success",
    )
    verb.add_argument(
        "--measured",
        choices=_RESULTS,
        help="how the measuring jobs ended; default: success, or skipped if none was planned",
    )


def _gate(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import gate  # noqa: PLC0415 - not for --help

    return gate.main(
        at,
        plan_file=args.plan,
        bundles=args.bundles,
        out=args.out,
        plan_result=args.plan_result,
        measured=args.measured,
    )


def _adopt_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("gate", type=Path, metavar="GATE.JSON", help="by `fleet gate`")
    how = verb.add_mutually_exclusive_group()
    how.add_argument(
        "--commit",
        action="store_true",
        help="as one commit on the branch of the pull request, by GitHub's API",
    )
    how.add_argument("--dry-run", action="store_true", help="say what would change; change nothing")


def _adopt(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import adopt  # noqa: PLC0415 - not for --help

    return adopt.main(at, args.gate, commit=args.commit, dry_run=args.dry_run)


def _comment_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--dry-run", action="store_true", help="print it; else it goes on the pull request"
    )
    verb.add_argument(
        "--base",
        metavar="REV",
        help="held against this; default: where HEAD left the default branch",
    )
    verb.add_argument("--head", metavar="REV", help="default: the working tree")
    verb.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="only these")
    verb.add_argument("--gate", type=Path, metavar="GATE.JSON", help="by `fleet gate`, for both")


def _comment(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import comment  # noqa: PLC0415 - not for --help

    return comment.main(
        at,
        dry_run=args.dry_run,
        base=args.base,
        head=args.head,
        gate=args.gate,
        models=words(args.model),
    )


def _health_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "use",
        choices=("api", "probe", "issues"),
        help="ask GitHub; look at this machine; keep one issue for each sick host",
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="of api, probe: gets the record")
    verb.add_argument("--host", metavar="HOST", help="of probe: key in hosts: of params.yaml")
    verb.add_argument("--runners", type=Path, metavar="FILE", help="of issues: by api")
    verb.add_argument("--probes", type=Path, metavar="DIR", help="of issues: records, by probe")
    verb.add_argument(
        "--dry-run", action="store_true", help="of issues: say what would change; change nothing"
    )
    verb.add_argument("--json", action="store_true", help="print the record as JSON")


def _health(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import runner_health  # noqa: PLC0415 - not for --help

    if args.use == "api":
        return runner_health.api(at, out=args.out, as_json=args.json)
    if args.use == "probe":
        return runner_health.probe(at, host=args.host or None, out=args.out, as_json=args.json)
    if args.runners is None:
        raise ParamsError(
            "`fleet runner-health issues` needs what `api` found.",
            hint="fleet runner-health api --out runners.json, then issues --runners runners.json",
        )
    return runner_health.issues(
        at, runners=args.runners, probes=args.probes, dry_run=args.dry_run, as_json=args.json
    )


VERBS = (
    Verb(
        "plan",
        "say what a pull request changes, what has to run where and why, and what that costs",
        _plan_options,
        _plan,
        # A branch that deletes it has a plan too: that says so.
        is_declared=False,
    ),
    Verb(
        "bundle",
        "pack what was measured of models into one file each, for the gate",
        _bundle_options,
        _bundle,
    ),
    Verb(
        "gate",
        "judge what a pull request measured; exit 0 only for PROMOTE",
        _gate_options,
        _gate,
        is_declared=False,
    ),
    Verb(
        "comment",
        "say what a pull request means, on it, or with --dry-run here",
        _comment_options,
        _comment,
    ),
    Verb("adopt", "put the records that a gate accepted into git", _adopt_options, _adopt),
    Verb(
        "runner-health",
        "say whether the machines that measure are there and well",
        _health_options,
        _health,
    ),
)
