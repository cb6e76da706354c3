"""
`fleet VERB [KEY]`: parse, bind, run, exit code; nothing else.

A person, a DVC stage and a GitHub action all type the same line. For a stage the binder resolves
the key's slice of params.yaml, calls the stage's `run(slice, layout)` and writes the record that
it returns. Modules are imported when their verb runs, so that `fleet --help` costs nothing.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn, cast

from pipelines import __version__, ci_verbs, console, fork_verbs, release_verbs, upstream_verbs
from pipelines.errors import FleetError, MachineError, ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from pipelines.layout import Layout
    from pipelines.params import ChooseSlice, Closed, Declaration, QuantizeSlice, ReportSlice
    from pipelines.records import Record

INTERRUPTED = 130
_FAULTS_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO})
# What argparse says of a word that is none of the known ones; the quotes depend on the Python.
_CHOICE = re.compile(
    r"(?P<head>invalid choice: '(?P<word>[^']*)') \(choose from (?P<known>.*)\)", re.DOTALL
)
# Set by `fleet repro` for everything below it: a stage must not outlive the run that wanted it.
REPRO_ENV = "GGUF_FLEET_REPRO"


@dataclass(frozen=True)
class Stage:
    """One stage of the graph, as the command line sees it."""

    name: str
    keyed_by: Literal["model", "quant", "fleet"]
    help: str


STAGES = (
    Stage("fetch", "model", "bring the verified bytes of the pinned revision"),
    Stage("convert", "model", "make the 16-bit GGUF"),
    Stage("verify", "model", "prove the conversion: tokens, template, tensors, logits"),
    Stage("calibrate", "model", "compute the importance matrix, if one is declared"),
    Stage("quantize", "quant", "make one quantized GGUF and prove what is in it"),
    Stage("benchmark", "quant", "measure speed, divergence from f16 and memory"),
    Stage("evaluate", "model", "do the declared tasks with f16 and every quant, and pair them"),
    Stage("choose", "model", "pick the best quant for each host and say why not the others"),
    Stage("load-test", "model", "serve the chosen quant, load it, judge the service levels"),
    Stage("publish", "model", "make what passed its gates a release in the local registry"),
    Stage("track", "model", "tell MLflow about every measured quant"),
    Stage("report", "fleet", "write the report for terminal, Markdown and HTML"),
)
# Those that depend on work/toolchain.json.
WITH_TOOLS = frozenset(
    ("convert", "verify", "calibrate", "quantize", "benchmark", "evaluate", "load-test")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the only place where an exception becomes text and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if os.environ.get(REPRO_ENV):
        from pipelines import proc  # noqa: PLC0415 - only below `fleet repro`

        proc.die_with_parent()
    args = parser().parse_args(argv)
    if argv is None and not os.environ.get(REPRO_ENV):
        _warn_of_other_code()
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except FleetError as error:
        _explain(error)
        return error.exit_code
    except KeyboardInterrupt:
        console.error("stopped. Nothing unfinished has a final name; the same command goes on.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our stdout (`| head`) has seen enough; that is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _FAULTS_OF_THE_DISK:
            raise
        _explain(_disk_error(error))
        return MachineError.exit_code


def _warn_of_other_code() -> None:
    """Say it where the code of another checkout runs: its numbers would be taken for ours."""
    from pipelines import doctor_code  # noqa: PLC0415 - as every verb's

    here = Path()
    if doctor_code.is_other(here):
        steps = (each.partition("#")[0].strip() for each in doctor_code.way_back(here).splitlines())
        console.warn(
            f"{doctor_code.OTHER}, {doctor_code.RUNNING.parent}. Here: {' && '.join(steps)}"
        )


def _disk_error(error: OSError) -> MachineError:
    """Put what the disk refuses into words; no bug of ours, so no traceback."""
    where = f": {error.filename}" if error.filename else ""
    return MachineError(
        f"{error.strerror}{where}. Nothing unfinished has a final name.",
        hint="Make room, or make it writable, and run the same command again.",
    )


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    """Treat a polite request to end like Ctrl-C, so that children are stopped and parts removed."""
    raise KeyboardInterrupt


def _explain(error: FleetError) -> None:
    """Say what went wrong, where, where the whole output is, and what to do next."""
    if isinstance(error, ParamsError) and error.problems:
        for problem in error.problems:
            console.error(problem.text, where=problem)
    else:
        console.error(error.message)
    if error.log is not None:
        console.info(f"  log:  {error.log}")
    if error.hint:
        console.info(f"  next: {error.hint}")


# --- the command line -------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser that guesses which word was meant; its verbs' parsers are of this kind, too."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the line, and exit 2."""
        from pipelines.wording import did_you_mean  # noqa: PLC0415 - only for a mistake

        def guess(found: re.Match[str]) -> str:
            known = [each.strip("'") for each in found["known"].split(", ")]
            meant = did_you_mean(found["word"], known)
            return f"{found['head']}{meant} ({found['known']})" if meant else found[0]

        super().error(_CHOICE.sub(guess, message))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, as `fleet --help` shows it."""
    whole: argparse.ArgumentParser = _Parser(
        prog="fleet",
        description="Keep a fleet of quantized GGUF models current, measured and reversible.",
        epilog="Exit codes: 0 done, 2 declaration, 3 upstream, 4 tool, 5 gate, 6 digest, "
        "7 machine, 8 store, 75 try later, 130 interrupted.",
    )
    whole.add_argument("--version", action="version", version=f"gguf-fleet {__version__}")
    verbs = whole.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_operations(verbs)
    for stage in STAGES:
        _add_stage(verbs, stage)
    release_verbs.add(verbs, _add, _layout)
    table = (*ci_verbs.VERBS, *upstream_verbs.VERBS, *fork_verbs.VERBS)
    ci_verbs.add(verbs, _add, _layout, table)
    return whole


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help_, description=help_[0].upper() + help_[1:] + ".")
    verb.set_defaults(run=run, verb=name)
    return verb


def _add_operations(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    repro = _add(verbs, "repro", "run every stage whose inputs changed", _repro)
    repro.add_argument("targets", nargs="*", metavar="MODEL|QUANT", help="default: everything")
    repro.add_argument(
        "--until",
        choices=[stage.name for stage in STAGES if stage.keyed_by != "fleet"],
        metavar="STAGE",
        help="stop after this stage, with no report: quantize, benchmark, choose, load-test, ...",
    )
    repro.add_argument(
        "--host",
        metavar="HOST",
        help="key in hosts: that this machine is; goes on from the records of that host",
    )
    repro.add_argument("--force", action="store_true", help="run the stages even if unchanged")
    repro.add_argument("--wait", action="store_true", help="wait for another run to end")

    check = _add(verbs, "check", "say whether params.yaml can be built, line by line", _check)
    check.add_argument("--json", action="store_true", help="print the problems as JSON")

    tools = _add(
        verbs,
        "toolchain",
        "build the pinned llama.cpp and the engine that serves, or show them",
        _tools,
    )
    tools.add_argument("--json", action="store_true", help="print the manifest as JSON")
    tools.add_argument("--verify", action="store_true", help="hash every tool again")

    compare = _add(
        verbs, "compare", "compare with what was chosen before, in one interleaved run", _compare
    )
    compare.add_argument("models", nargs="+", metavar="MODEL", help="keys in params.yaml")
    against = compare.add_mutually_exclusive_group()
    against.add_argument(
        "--base",
        metavar="REV",
        help="champion: what this commit chose; default: where this branch left the default one",
    )
    against.add_argument(
        "--champion", metavar="stable|RELEASE", help="champion: a release of the local registry"
    )
    compare.add_argument("--quant", metavar="TYPE", help="challenger; default: what is chosen")
    compare.add_argument(
        "--host",
        metavar="HOST",
        help="key in hosts: for which both are chosen; default: the first one",
    )
    compare.add_argument(
        "--budget", type=_minutes, metavar="MINUTES", help="default: compare.max_minutes"
    )
    compare.add_argument("--plan", action="store_true", help="say how long it takes, and stop")
    compare.add_argument(
        "--fresh", action="store_true", help="forget what a stopped run has measured"
    )
    compare.add_argument(
        "--if-comparable",
        action="store_true",
        help="a model with nothing to compare with is a notice and no error",
    )
    compare.add_argument("--json", action="store_true", help="print the record as JSON")

    _add(verbs, "machine", "write what this machine and its tools are, for DVC", _machine)

    digest = _add(verbs, "digest", "print the revision of a `path:` source", _digest)
    digest.add_argument("directory", type=Path, help="directory with the model's files")
    digest.add_argument("--json", action="store_true", help="print directory and revision as JSON")

    schema = _add(verbs, "schema", "print the JSON Schema of params.yaml", _schema)
    schema.add_argument(
        "--write",
        action="store_true",
        help="write params.schema.json, release.schema.json and the pages that are generated",
    )
    schema.add_argument("--check", action="store_true", help="exit 2 if those files are stale")


def _add_stage(verbs: argparse._SubParsersAction[argparse.ArgumentParser], stage: Stage) -> None:
    verb = _add(verbs, stage.name, stage.help, _stage)
    verb.set_defaults(stage=stage)
    if stage.name != "report":
        verb.add_argument("--json", action="store_true", help="print the record as JSON")
    if stage.name == "track":
        verb.add_argument("key", nargs="?", metavar="MODEL", help="default with --rebuild: all")
        verb.add_argument(
            "--rebuild", action="store_true", help="tell a new or lost store everything again"
        )
    elif stage.name == "publish":
        verb.add_argument("key", nargs="?", metavar="MODEL", help="default with --to: all")
        release_verbs.add_publish(verb)
    elif stage.keyed_by != "fleet":
        verb.add_argument("key", metavar=stage.keyed_by.upper(), help="key in params.yaml")
    if stage.name == "load-test":
        _add_load_test(verb)
    if stage.name == "quantize":
        verb.add_argument(
            "--explain",
            action="store_true",
            help="only say what it will be: size, bits per weight, types, fallbacks, memory",
        )
    if stage.name == "choose":
        verb.add_argument(
            "--what-if",
            action="append",
            metavar="NAME=VALUE",
            help="only say what would be chosen with another limit, e.g. vram_mib=12288; repeat it",
        )
    if stage.name == "report":
        verb.add_argument(
            "--strict", action="store_true", help="exit 5 unless every model is PROMOTE"
        )


def _add_load_test(verb: argparse.ArgumentParser) -> None:
    """Add what else the load generator can do; each writes no record of the stage."""
    instead = verb.add_argument_group("instead of the stage")
    instead.add_argument("--url", help="drive a running server: http://host:11434")
    instead.add_argument(
        "--api", choices=("auto", "ollama", "openai"), default="auto", help="what --url speaks"
    )
    instead.add_argument("--name", metavar="NAME", help="model as that server calls it")
    instead.add_argument(
        "--prompts", action="store_true", help="run the declared prompt regressions"
    )
    instead.add_argument(
        "--sweep", choices=("gpu_layers",), help="measure speed over the layers on the GPU"
    )


def _layout() -> Layout:
    """
    Paths of the checkout that we stand in.

    Raises:
        ParamsError: The working directory is not the root of a fleet.
    """
    from pipelines.layout import Layout  # noqa: PLC0415 - not for --help

    if not Path("params.yaml").exists():
        raise ParamsError(
            f"there is no params.yaml in {Path.cwd()}.",
            hint="Go to the root of your fleet, the folder with params.yaml and dvc.yaml.",
        )
    return Layout()


# --- stages -----------------------------------------------------------------------------------


def _require_own_records(stage: Stage, declared: Declaration, at: Layout) -> None:
    """See that what leaves this checkout is not of a host whose records only lie here."""
    if stage.name in {"publish", "track"} and at.laid.exists():
        from pipelines import host_records  # noqa: PLC0415 - hardly ever

        host_records.require(at, declared, None)


def _stage(args: argparse.Namespace) -> int:
    from pipelines import inputs  # noqa: PLC0415 - not for --help

    at = _layout()
    declared = _load(at)
    _require_own_records(args.stage, declared, at)
    if args.stage.name == "track" and (args.rebuild or args.key is None):
        if args.key is not None:
            _slice(at, declared, args.stage, args.key)
        return _track_all(at, declared, args.key, rebuild=args.rebuild)
    if args.stage.name == "publish" and release_verbs.is_publish_to(args):
        return release_verbs.publish_to(args, declared, at)
    key = "fleet" if args.stage.keyed_by == "fleet" else args.key
    if args.stage.name == "load-test" and (args.name or args.api != "auto") and not args.url:
        raise ParamsError("`--name` and `--api` are about the server of `--url`.", hint="--url URL")
    if args.stage.name == "load-test" and (args.url or args.prompts or args.sweep):
        from pipelines import load_operations  # noqa: PLC0415 - only for these options

        return load_operations.main(declared, at, args)
    slice_ = _slice(at, declared, args.stage, key)
    inputs.require(args.stage.name, slice_.model_dump(), at)
    if getattr(args, "explain", False) or getattr(args, "what_if", None):
        return _foretell(args, declared, slice_, at)
    module = import_module(f"pipelines.{args.stage.name.replace('-', '_')}")
    at.log(args.stage.name, key).unlink(missing_ok=True)  # programs append; a log is of one run
    if args.stage.name == "report":
        return _report(at, cast("ReportSlice", slice_), strict=args.strict)
    record: Record = module.run(slice_, at)
    _write(at, args.stage, slice_, record)
    if args.stage.name in WITH_TOOLS and os.environ.get("DVC_STAGE"):
        from pipelines import machine  # noqa: PLC0415 - not for --help

        # Typed by hand, a stage leaves dvc.lock as it is, and what git says of its tools as well.
        machine.keep_tools(slice_.model_dump()["model"], at)
    if args.json:
        console.out(record.model_dump_json(indent=2))
    return 0


def _foretell(args: argparse.Namespace, declared: Declaration, slice_: Closed, at: Layout) -> int:
    """Say what a stage would do, and do nothing."""
    if args.stage.name == "choose":
        from pipelines import what_if  # noqa: PLC0415 - only for this option

        return what_if.main(cast("ChooseSlice", slice_), at, args.what_if, as_json=args.json)
    from pipelines import explain, params  # noqa: PLC0415 - only for this option

    measured = params.benchmark_slice(declared, args.key)
    return explain.main(cast("QuantizeSlice", slice_), measured, at, as_json=args.json)


def _load(at: Layout) -> Declaration:
    from pipelines import declaration  # noqa: PLC0415 - not for --help

    return declaration.load(at.params)


def _slice(at: Layout, declared: Declaration, stage: Stage, key: str) -> Closed:
    """
    Resolve what a stage reads for one key.

    Raises:
        ParamsError: The key is not declared, or params.yaml was edited since DVC decided that this
            stage has to run: the lock would then record values that were not used.
    """
    from pipelines import declaration  # noqa: PLC0415 - not for --help
    from pipelines.wording import did_you_mean, quoted  # noqa: PLC0415 - the same

    slices = declaration.slices(declared)
    if (stage.name, key) not in slices:
        known = [name for verb, name in slices if verb == stage.name]
        raise ParamsError(
            f"{stage.keyed_by} {quoted(key)} is not declared in {at.params}"
            f"{did_you_mean(key, known) or '.'}",
            hint=f"Declared: {', '.join(known)}.",
        )
    slice_ = slices[stage.name, key]
    tracked = at.slice(stage.name, key)
    if os.environ.get("DVC_STAGE") and tracked.exists():
        then = type(slice_).model_validate_json(tracked.read_bytes())
        if then != slice_:
            raise ParamsError(
                f"{at.params} was edited while DVC was running: {stage.name} {key} would use "
                "values that DVC did not see.",
                hint="Run the same command again.",
            )
    return slice_


def _write(at: Layout, stage: Stage, slice_: Closed, record: Record) -> None:
    """Put a record where its readers look for it."""
    from pipelines import records  # noqa: PLC0415 - not for --help

    named = slice_.model_dump()
    if stage.name == "track":
        path = at.receipt(named["model"])
    elif stage.keyed_by == "quant":
        path = at.quant_record(stage.name, named["model"], named["type"])
    else:
        path = at.model_record(stage.name, named["model"])
    records.write(path, record)


def _track_all(at: Layout, declared: Declaration, only: str | None, *, rebuild: bool) -> int:
    """Track every model, or that of one key."""
    from pipelines import params, records, track  # noqa: PLC0415 - mlflow

    for model in declared.models if only is None else (only,):
        slice_ = params.track_slice(declared, model)
        receipt = track.rebuild(slice_, at) if rebuild else track.run(slice_, at)
        records.write(at.receipt(model), receipt)
    return 0


def _report(at: Layout, slice_: ReportSlice, *, strict: bool) -> int:
    from pipelines import report  # noqa: PLC0415 - jinja2

    text = report.run(slice_, at)
    console.out(text)
    if strict:
        report.require_promote(slice_, at)
    return 0


# --- operations -------------------------------------------------------------------------------


def _repro(args: argparse.Namespace) -> int:
    from pipelines import repro  # noqa: PLC0415 - rich

    at = _layout()
    targets = _named(args.targets) if args.targets else ()
    return repro.main(
        at,
        targets,
        until=args.until,
        # Blank where a workflow has nothing to say.
        host=args.host or None,
        force=args.force,
        wait=args.wait,
    )


def _named(typed: list[str]) -> tuple[str, ...]:
    """
    Return the names that were typed, several in one argument or one in each.

    Raises:
        ParamsError: There is an argument and no name in it: an empty list in a workflow is a fault
            of that workflow, never the whole fleet.
    """
    names = ci_verbs.words(typed)
    if not names:
        raise ParamsError("no model or quant is named.", hint="Name one: fleet repro MODEL")
    return names


def _check(args: argparse.Namespace) -> int:
    from pipelines import declaration  # noqa: PLC0415 - pydantic

    return declaration.check_main(_layout(), as_json=args.json)


def _minutes(text: str) -> float:
    """Read a time of the command line."""
    value = float(text)
    if not 0 < value <= 1440:  # noqa: PLR2004 - a day
        raise ValueError(text)
    return value


def _compare(args: argparse.Namespace) -> int:
    from pipelines import compare  # noqa: PLC0415 - pydantic

    at = _layout()
    return compare.main(
        _load(at),
        at,
        models=_named(args.models),
        # Blank where a workflow has nothing to say.
        base=args.base or None,
        champion=args.champion,
        quant=args.quant,
        host=args.host or None,
        budget_minutes=args.budget,
        plan_only=args.plan,
        fresh=args.fresh,
        if_comparable=args.if_comparable,
        as_json=args.json,
    )


def _tools(args: argparse.Namespace) -> int:
    from pipelines import toolchain  # noqa: PLC0415 - pydantic
    from pipelines.serving import engine  # noqa: PLC0415 - the same

    at = _layout()
    declared = _load(at)
    tools = toolchain.ensure(toolchain.spec_of(declared))
    console.info(
        engine.find(declared.serving, tools, log=at.log("toolchain", "engine")).id.sentence
    )
    if args.verify:
        tools.verify()
        console.info("verified: every file is what was built")
    console.out(json.dumps(tools.manifest, indent=2) if args.json else toolchain.main_text(tools))
    return 0


def _machine(_args: argparse.Namespace) -> int:
    from pipelines import declaration, machine, params, publish, toolchain, track  # noqa: PLC0415

    at = _layout()
    declared = declaration.load(at.params)
    tools = toolchain.ensure(toolchain.spec_of(declared))
    declaration.write_slices(declared, at)
    machine.write(at, tools)
    for model in declared.models:
        publish.note(params.publish_slice(declared, model), at)
        publish.note_comparison(model, at)
    track.withdraw_pending(at)
    return 0


def _digest(args: argparse.Namespace) -> int:
    from pipelines import fetch  # noqa: PLC0415 - pydantic

    revision = fetch.content_digest(args.directory)
    told = {"directory": str(args.directory), "revision": revision}
    console.out(json.dumps(told, indent=2) if args.json else revision)
    return 0


def _schema(args: argparse.Namespace) -> int:
    from pipelines import schema  # noqa: PLC0415 - pydantic

    if args.check:
        stale = schema.in_sync(Path())
        if stale:
            raise ParamsError(
                f"{', '.join(stale)}: not what the types in pipelines/ say.",
                hint="fleet schema --write",
            )
    elif args.write:
        schema.write(Path())
    else:
        console.out(schema.generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
