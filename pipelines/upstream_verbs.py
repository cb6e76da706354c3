"""
The verbs that follow upstream, as the command line sees them: names, options, help.

What each does is in a module of its own, which is imported when it is typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.ci_verbs import Verb, words

if TYPE_CHECKING:
    import argparse

    from pipelines.layout import Layout


# --- one pair for each verb: its options, and the call ----------------------------------------


def _check_upstream_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("models", nargs="*", metavar="MODEL", help="default: the whole fleet")
    verb.add_argument("--json", action="store_true", help="print the record as JSON")
    verb.add_argument("--out", type=_file, metavar="FILE", help="write the record here, too")
    verb.add_argument(
        "--previous",
        type=_file,
        metavar="FILE",
        help="the record of the look before; default: that of this checkout",
    )
    verb.add_argument(
        "--if-due",
        action="store_true",
        help="only if the last look is older than check_upstream.period_hours; asks no index of "
        "engines",
    )
    verb.add_argument(
        "--strict", action="store_true", help="exit 5 if something moved or a person has to look"
    )
    verb.add_argument(
        "--github",
        choices=("look", "issue"),
        help="in a workflow: look, from the record of its last run on; or, by the record that "
        "--previous names, keep one issue for what a person has to look at",
    )


def _file(text: str) -> Path | None:
    """Read a path; an action passes an empty one for none."""
    return Path(text) if text else None


def _check_upstream(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import upstream_due  # noqa: PLC0415 - not for --help

    if args.if_due and upstream_due.is_fresh(at):
        return 0
    if args.github == "issue":
        from pipelines import upstream_github  # noqa: PLC0415 - not for --help

        return upstream_github.issue(args.previous)
    if args.github == "look":
        from pipelines import upstream_github  # noqa: PLC0415 - not for --help

        return upstream_github.look(at, words(args.models), out=args.out, as_json=args.json)
    from pipelines import check_upstream  # noqa: PLC0415 - pydantic

    return check_upstream.main(
        at,
        words(args.models),
        as_json=args.json,
        out=args.out,
        previous=args.previous,
        if_due=args.if_due,
        strict=args.strict,
    )


def _bump_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("models", nargs="*", metavar="MODEL", help="the only models to propose")
    verb.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME",
        help="propose this engine: llama.cpp or ollama",
    )
    verb.add_argument(
        "--all", action="store_true", help="propose every model and engine that moved"
    )
    where = verb.add_mutually_exclusive_group()
    where.add_argument(
        "--local", action="store_true", help="make the branch in this clone, without GitHub"
    )
    where.add_argument(
        "--dry-run", action="store_true", help="print the pull request, and change nothing"
    )
    verb.add_argument(
        "--upstream",
        type=Path,
        metavar="FILE",
        help="the record of a look; default: the last one of this checkout",
    )
    verb.add_argument("--json", action="store_true", help="print what was done as JSON")


def _bump(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import bump  # noqa: PLC0415 - pydantic

    return bump.main(
        at,
        words(args.models),
        engines=words(args.engine),
        everything=args.all,
        local=args.local,
        dry_run=args.dry_run,
        upstream=args.upstream,
        as_json=args.json,
    )


VERBS = (
    Verb(
        "check-upstream",
        "say what is newer upstream than what is declared; the only verb that asks",
        _check_upstream_options,
        _check_upstream,
    ),
    Verb(
        "bump",
        "propose what is newer: one branch, one pull request, one changed pin each",
        _bump_options,
        _bump,
    ),
)
