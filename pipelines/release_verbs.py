"""
The verbs about releases, as the command line sees them: names, options, help.

What each does is in a module of its own, which is imported when it is typed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pipelines.errors import ParamsError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from pipelines.layout import Layout
    from pipelines.params import Declaration

    class AddVerb(Protocol):
        """How `pipelines.__main__` adds a verb."""

        def __call__(
            self,
            verbs: argparse._SubParsersAction[argparse.ArgumentParser],
            name: str,
            help_: str,
            run: Callable[[argparse.Namespace], int],
        ) -> argparse.ArgumentParser:
            """Return the parser of the verb."""
            ...


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    add_verb: AddVerb,
    find: Callable[[], Layout],
) -> None:
    """
    Add every verb but `publish`, which is a stage.

    Args:
        verbs: Of the command line.
        add_verb: Adds one.
        find: Returns the paths of the checkout that we stand in.
    """
    for each in _VERBS:
        verb = add_verb(verbs, each.name, each.help, partial(_in_checkout, find, each.run))
        each.add_options(verb)
        _json(verb)


def add_publish(verb: argparse.ArgumentParser) -> None:
    """Add to the stage `publish` what sends a release to another registry."""
    other = verb.add_argument_group("to another registry, instead of the stage")
    other.add_argument(
        "--to", metavar="NAME", help="publish to this registry of params.yaml; all models if none"
    )
    other.add_argument(
        "--environment",
        metavar="NAME",
        help="publish to every registry of this deployment environment, instead of --to",
    )
    other.add_argument("--reason", metavar="TEXT", help="why, for the ledger")
    other.add_argument(
        "--pull",
        action="store_true",
        help="bring from DVC's remote what is neither here nor in the registry",
    )
    other.add_argument(
        "--checksums",
        type=Path,
        metavar="FILE",
        help="write `sha256  name` of every published file, for an attestation",
    )
    other.add_argument(
        "--propose",
        action="store_true",
        help="bring ledger and releases to the default branch by a pull request",
    )
    other.add_argument(
        "--plan",
        action="store_true",
        help="only say by git which registries of which environments have something to do",
    )
    _dry_run(other)


def is_publish_to(args: argparse.Namespace) -> bool:
    """
    Tell whether `fleet publish` was typed as a verb rather than as the stage.

    Raises:
        ParamsError: It is half of each.
    """
    # A workflow gives an input that nobody filled in as an empty word.
    for name in ("key", "to", "environment", "reason"):
        setattr(args, name, getattr(args, name) or None)
    if args.to is not None and args.environment is not None:
        raise ParamsError(
            "`--to` names one registry, `--environment` all of one environment: not both.",
            hint="fleet publish --environment NAME",
        )
    if args.to is not None or args.environment is not None or args.plan:
        return True
    only_of_the_verb = (args.reason, args.dry_run, args.pull, args.checksums, args.propose)
    if args.key is None or any(only_of_the_verb):
        raise ParamsError(
            "`fleet publish` without a registry is the stage of one model, and takes neither "
            "`--reason` nor `--dry-run`, `--pull`, `--checksums`, `--propose`.",
            hint="fleet publish --to NAME publishes every model to a registry of params.yaml.",
        )
    return False


def publish_to(args: argparse.Namespace, declared: Declaration, at: Layout) -> int:
    """Do `fleet publish [MODEL] --to NAME`, or say with `--plan` where that is due."""
    if args.plan:
        from pipelines import publish_plan  # noqa: PLC0415 - not for --help

        return publish_plan.main(
            declared, at, model=args.key, environment=args.environment, as_json=args.json
        )
    from pipelines import publish_to as verb  # noqa: PLC0415 - not for --help

    return verb.main(
        declared,
        at,
        model=args.key,
        to=args.to,
        environment=args.environment,
        reason=args.reason,
        options=verb.Options(
            pull=args.pull,
            checksums=args.checksums,
            propose=args.propose,
            dry_run=args.dry_run,
            as_json=args.json,
        ),
    )


class _Verb(NamedTuple):
    """A verb: its options beside `--json`, and what it does in a checkout."""

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Declaration, Layout, argparse.Namespace], int]


def _in_checkout(
    find: Callable[[], Layout],
    run: Callable[[Declaration, Layout, argparse.Namespace], int],
    args: argparse.Namespace,
) -> int:
    from pipelines import declaration  # noqa: PLC0415 - not for --help

    at = find()
    return run(declaration.load(at.params), at, args)


def _dry_run(verb: argparse._ActionsContainer) -> None:
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would change; change nothing"
    )


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the result as JSON")


# --- one pair for each verb: its options, and the call ----------------------------------------


def _rollback_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="key in params.yaml")
    verb.add_argument(
        "--to",
        required=True,
        metavar="RELEASE",
        help="release id (8 digits are enough), `previous`, or `latest` to end a rollback",
    )
    verb.add_argument("--registry", metavar="NAME", help="default: every one that holds the model")
    verb.add_argument(
        "--environment",
        metavar="NAME",
        help="only registries that declare it, whose logins a job in it has",
    )
    verb.add_argument("--reason", required=True, metavar="TEXT", help="why, for the ledger")
    verb.add_argument(
        "--pr",
        action="store_true",
        help="open the pull request by which params.yaml and ledger on GitHub agree",
    )
    _dry_run(verb)


def _rollback(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import rollback  # noqa: PLC0415 - not for --help

    return rollback.main(
        declared,
        at,
        model=args.model,
        target=args.to,
        environment=args.environment or None,
        registry=args.registry or None,
        reason=args.reason,
        pr=args.pr,
        dry_run=args.dry_run,
        as_json=args.json,
    )


def _releases_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="key in params.yaml")
    verb.add_argument("--registry", metavar="NAME", help="default: every one that holds the model")


def _releases(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import releases  # noqa: PLC0415 - not for --help

    return releases.main(declared, at, model=args.model, registry=args.registry, as_json=args.json)


def _pull_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL[@RELEASE]", help="`stable` if no release is named")
    verb.add_argument("--from", dest="registry", metavar="NAME", help="registry; default: local")
    verb.add_argument(
        "--quant", action="append", default=[], metavar="TYPE", help="may be repeated; default: one"
    )
    verb.add_argument("--all", action="store_true", help="every quant of the release")
    verb.add_argument("--to", type=Path, metavar="DIR", help="default: pulled/MODEL-<release>")
    _dry_run(verb)


def _pull(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import pull  # noqa: PLC0415 - not for --help

    return pull.main(
        declared,
        at,
        reference=args.model,
        registry=args.registry,
        types=tuple(args.quant),
        every=args.all,
        to=args.to,
        dry_run=args.dry_run,
        as_json=args.json,
    )


def _serve_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL[@RELEASE]", help="`stable` if no release is named")
    verb.add_argument("--from", dest="registry", metavar="NAME", help="registry; default: local")
    what = verb.add_mutually_exclusive_group()
    what.add_argument("--host", metavar="HOST", help="take the quant that was chosen for this host")
    what.add_argument("--quant", metavar="TYPE", help="take this quant")
    verb.add_argument(
        "--models-dir", type=Path, metavar="DIR", help="of that Ollama; default: OLLAMA_MODELS"
    )
    verb.add_argument("--url", metavar="URL", help="of that Ollama; default: OLLAMA_HOST")
    verb.add_argument("--name", metavar="NAME", help="served name; default: fleet/MODEL:stable")
    _dry_run(verb)


def _serve(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import registries, serve  # noqa: PLC0415 - not for --help

    model, alias = registries.reference(args.model)
    return serve.main(
        declared,
        at,
        model=model,
        alias=alias,
        registry=args.registry,
        host=args.host,
        quant=args.quant,
        models_dir=args.models_dir,
        url=args.url,
        name=args.name,
        dry_run=args.dry_run,
        as_json=args.json,
    )


def _gc_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--registry", required=True, metavar="NAME", help="key in params.yaml")
    verb.add_argument(
        "--keep-moves", type=int, default=10, metavar="N", help="last moves kept; default: 10"
    )
    verb.add_argument(
        "--keep-days",
        type=int,
        default=90,
        metavar="N",
        help="days whose moves are kept; default: 90",
    )
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--apply", action="store_true", help="remove it")
    _dry_run(how)


def _gc(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import registry_gc  # noqa: PLC0415 - not for --help

    return registry_gc.main(
        declared,
        at,
        name=args.registry,
        keep_moves=args.keep_moves,
        keep_days=args.keep_days,
        apply=args.apply,
        as_json=args.json,
    )


def _verify_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("name", metavar="NAME", help="key in params.yaml")


def _verify(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import registry_verify  # noqa: PLC0415 - not for --help

    return registry_verify.main(declared, at, name=args.name, as_json=args.json)


def _audit_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", nargs="?", metavar="MODEL", help="default: every model")


def _audit(declared: Declaration, at: Layout, args: argparse.Namespace) -> int:
    from pipelines import audit  # noqa: PLC0415 - not for --help

    return audit.main(declared, at, model=args.model, as_json=args.json)


_VERBS: tuple[_Verb, ...] = (
    _Verb(
        "rollback",
        "let `stable` of a model mean an earlier release, in params.yaml and in the registries",
        _rollback_options,
        _rollback,
    ),
    _Verb(
        "releases", "show who moved `stable` of a model, when and why", _releases_options, _releases
    ),
    _Verb("pull", "fetch a release: verified GGUF, Modelfile, release.json", _pull_options, _pull),
    _Verb(
        "serve", "put a release into your own Ollama, and back if it fails", _serve_options, _serve
    ),
    _Verb("gc", "free what no promised rollback needs; a dry run unless --apply", _gc_options, _gc),
    _Verb(
        "verify-registry",
        "hash everything in a registry again and compare it with git",
        _verify_options,
        _verify,
    ),
    _Verb(
        "audit",
        "tell which bytes ran when, made from what, by whose decision, and check the ledger",
        _audit_options,
        _audit,
    ),
)
