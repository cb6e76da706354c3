"""
The verbs of a fork's life, as the command line sees them: names, options, help.

What each does is in a module of its own, which is imported when it is typed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipelines.ci_verbs import Verb

if TYPE_CHECKING:
    import argparse

    from pipelines.layout import Layout


def _count(text: str) -> int | None:
    """Read a number of the command line; a blank, where a workflow has nothing to say, is none."""
    if not text.strip():
        return None
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


# --- one pair for each verb: its options, and the call ----------------------------------------


def _init_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="of the first model: hf:owner/repo, or path:folder with safetensors; default: asks",
    )
    model = verb.add_argument_group("the model")
    model.add_argument("--name", metavar="MODEL", help="its key; default: from the repository")
    model.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of the Hub; default: main"
    )
    model.add_argument(
        "--quants", metavar="TYPE,...", help="default: the usual ones that fit on the host"
    )
    model.add_argument(
        "--context", type=_count, metavar="TOKENS", help="default: what fits, to 16384"
    )
    model.add_argument(
        "--objective",
        # Blank where a workflow has nothing to say.
        choices=("speed", "quality", "size", ""),
        metavar="speed|quality|size",
        help="default: speed",
    )
    model.add_argument(
        "--license",
        metavar="SPDX|mine",
        help="that you read and accept, where its files state none; mine: the weights are yours",
    )
    model.add_argument(
        "--ignore-code",
        action="store_true",
        help="take it although it names Python code of its own, which is never fetched",
    )
    host = verb.add_argument_group("the host")
    host.add_argument("--host", metavar="NAME", help="key in hosts:; default: this machine's name")
    memory = host.add_mutually_exclusive_group()
    memory.add_argument(
        "--vram",
        type=_count,
        metavar="MIB",
        help="memory of its cards; default: of those found here",
    )
    memory.add_argument(
        "--memory",
        type=_count,
        metavar="MIB",
        help="main memory for a model, on a host without cards",
    )
    host.add_argument(
        "--runner-label",
        action="append",
        default=[],
        metavar="LABEL",
        help="label of its self-hosted runner, repeatable; default: gpu and the host's name",
    )
    rest = verb.add_argument_group("the repository")
    rest.add_argument(
        "--registry",
        metavar="URL",
        help="where releases go, as `production`: s3://, oci://, hf:, mlflow:, file:; default: "
        "the local one alone",
    )
    rest.add_argument(
        "--environment", metavar="NAME", help="of GitHub, that guards it; default: production"
    )
    rest.add_argument(
        "--remote", metavar="URL", help="DVC remote for large files; default: the folder there is"
    )
    rest.add_argument(
        "--owner",
        action="append",
        default=[],
        metavar="@LOGIN",
        help="code owner, repeatable; alone it changes nothing else; default: the owner of the git "
        "remote `origin`",
    )
    rest.add_argument(
        "--check-every", type=_count, metavar="HOURS", help="look at upstream; default: 24"
    )
    rest.add_argument(
        "--keep-example", action="store_true", help="keep the example model and its records"
    )
    verb.add_argument("--yes", action="store_true", help="write without a question")
    verb.add_argument("--dry-run", action="store_true", help="print the diff, and change nothing")
    verb.add_argument("--json", action="store_true", help="print what was done as JSON")
    verb.add_argument(
        "--github", action="store_true", help="in a workflow: as a pull request of this repository"
    )


def _init(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import init  # noqa: PLC0415 - pydantic

    return init.main(at, args)


def _doctor_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print the lines as JSON")
    verb.add_argument(
        "--security", action="store_true", help="which level of docs/security.md is reached"
    )
    verb.add_argument("--strict", action="store_true", help="exit 5 if a line is a warning")
    verb.add_argument("--offline", action="store_true", help="ask no server")


def _doctor(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import doctor  # noqa: PLC0415 - pydantic

    return doctor.main(
        at,
        as_json=args.json,
        security=args.security,
        strict=args.strict,
        offline=args.offline,
    )


def _template_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "use",
        nargs="?",
        default="status",
        choices=("status", "update", "migrate", "tree"),
        help="say what is newer, which is the default; merge it; rewrite renamed keys of "
        "params.yaml; or make the commits that hold only the template's paths, for a merge by git "
        "alone",
    )
    verb.add_argument("--to", metavar="TAG", help="version; default: the newest")
    verb.add_argument(
        "--from",
        dest="origin",
        metavar="URL",
        help="repository of the template; default: the git remote `template`",
    )
    verb.add_argument(
        "--base", metavar="TAG", help="version that this fork began from, where it cannot be found"
    )
    verb.add_argument(
        "--dry-run", action="store_true", help="say what would change; change nothing"
    )
    verb.add_argument(
        "--leave-conflicts", action="store_true", help="leave what conflicts in the work tree"
    )
    verb.add_argument("--json", action="store_true", help="print what was found as JSON")


def _template(at: Layout, args: argparse.Namespace) -> int:
    from pipelines import template  # noqa: PLC0415 - pydantic

    return template.main(at, args)


VERBS = (
    Verb(
        "init",
        "make a fleet of your own of this template: model, host, registry, owners",
        _init_options,
        _init,
        is_declared=False,
    ),
    Verb(
        "doctor",
        "say what is wrong with this machine, this repository and its settings, and the fix",
        _doctor_options,
        _doctor,
        is_declared=False,
    ),
    Verb(
        "template",
        "take the template's next version",
        _template_options,
        _template,
        is_declared=False,
    ),
)
