"""
`fleet bundle`: what was measured of a model for one host, as one small file for the gate.

A self-hosted machine has no right to write anywhere. So its records, their entries of dvc.lock, and
what machine and tools are leave it as one JSON file for each model; the GGUFs go to the remote of
DVC, named by their digest. A chain that failed has a bundle too: what there is, and why there is no
more.

`read` is for those who get such a file: it assumes that somebody else wrote it
(`pipelines.bundle_checks`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pipelines import (
    atomic,
    bundle_checks,
    console,
    declaration,
    hashing,
    lock_entries,
    params,
    proc,
    records,
    runner,
    strict_json,
    times,
    trees,
    wording,
)
from pipelines.ci_records import BundleRecord, PlanRecord, TimesRecord
from pipelines.errors import FleetError, ParamsError, RetryLaterError, StoreError, ToolError
from pipelines.layout import Layout
from pipelines.records import QuantizeRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipelines.params import Declaration
    from pipelines.records import FileDigest

# Of one bundle: what GitHub's own tools take of a job, and a hundred times a record.
MAX_BYTES: Final = 1 << 20
# A larger file was hashed when it was made, and DVC knows whether it changed since.
_HASHED_AGAIN_BYTES: Final = 256 << 20
# `files` hold the text of records, line by line.
_WITH_LINES: Final = frozenset({"files", "machine", "toolchain"})
_MIB: Final = 1 << 20
_NO_SUCH_OPTION: Final = range(256)


class BundleError(FleetError):
    """A bundle is not one, or not to be believed."""


# --- the verb ---------------------------------------------------------------------------------


def main(  # noqa: PLR0913 - one for each option
    at: Layout,
    models: Sequence[str],
    *,
    host: str,
    out: Path,
    push: bool = False,
    plan_file: Path | None = None,
) -> int:
    """
    Pack what was measured here.

    Args:
        at: The checkout.
        models: Keys of params.yaml.
        host: For which this machine measured.
        out: Directory for `bundle-HOST-MODEL.json`.
        push: Send the GGUFs to the default remote of DVC.
        plan_file: The plan that asked for it; its commit is what was measured.

    Raises:
        ParamsError: A model or the host is not declared, or the plan asks for something else.
        BundleError: Records are larger than a bundle may be.
        StoreError: The remote refused a file; the bundles are written.
    """
    declared = declaration.load(at.params)
    require_declared(declared, models, host)
    head = _head(at, plan_file, models, host)
    remote, refused = _push(at, declared, models) if push else (None, None)
    written = []
    for model in models:
        record = measured(at, declared, model, host=host, head=head, remote=remote)
        path = out / name_of(record)
        _write(path, record)
        written.append(path.name)
        console.info(f"{path}: {wording.counted(len(record.files), 'record')} of {model}")
        for clause in record.failures:
            console.warn(wording.sentence(f"{model} on {host}: {clause}"))
        if record.failures and not console.in_actions():
            console.info(f"  next: fleet repro {model} --until load-test, then bundle again")
    runner.outputs(bundles=" ".join(written))
    if refused is not None:
        raise refused
    return 0


def name_of(record: BundleRecord) -> str:
    """Return the name of a bundle's file."""
    return f"bundle-{record.host}-{record.model}.json"


def primary_host(declared: Declaration, model: str | None = None) -> str:
    """
    Return the host whose records are those of results/MODEL: the first one that is measured.

    Of a model it is the first of its own hosts; where none of them is measured, the fleet's first
    one measures for them. Where none at all is, somebody measures by hand, for whichever host
    stands first.

    Args:
        declared: The declaration.
        model: A declared one; None for that of models that name no hosts.
    """
    own = () if model is None else tuple(params.routed_hosts(declared, model))
    of_model = [name for name in own if declared.hosts[name].runs_on]
    return next(iter([*of_model, *measured_hosts(declared), *own, *declared.hosts]))


def measured_hosts(declared: Declaration, model: str | None = None) -> tuple[str, ...]:
    """
    Return the hosts for which a runner measures, in the order of the declaration.

    Args:
        declared: The declaration.
        model: Only those that measure this one: its own hosts, or, where none of them has a
            runner, the one that measures for them. None for all hosts.
    """
    names = tuple(name for name, spec in declared.hosts.items() if spec.runs_on)
    if model is None or not names:
        return names
    own = params.routed_hosts(declared, model)
    return tuple(name for name in names if name in own) or names[:1]


def require_declared(declared: Declaration, models: Sequence[str], host: str) -> None:
    """
    See that models are declared, and that the host is one that is measured.

    Raises:
        ParamsError: One is not; says which are.
    """
    named = [("model", model, tuple(declared.models)) for model in models]
    for what, word, known in [*named, ("host", host, tuple(declared.hosts))]:
        if word not in known:
            raise ParamsError(
                f"{what} {wording.quoted(word)} is not declared"
                f"{wording.did_you_mean(word, known) or '.'}",
                hint=f"Declared: {', '.join(known)}.",
            )
    if not declared.hosts[host].runs_on:
        raise ParamsError(
            f"host {host} has no runner of its own: `runs_on` is not declared.",
            hint="Declare the labels of the runner that measures for it, or name a host that has "
            "some.",
        )


def _head(at: Layout, plan_file: Path | None, models: Sequence[str], host: str) -> str:
    """Return the commit that was measured."""
    if plan_file is None:
        return runner.head() or trees.Git(at.root).commit("HEAD")
    plan = read_plan(plan_file)
    asked = {model for leg in plan.legs if leg.host == host for model in leg.models}
    if foreign := [model for model in models if model not in asked]:
        raise ParamsError(
            f"{plan_file} does not ask for {wording.first_few(foreign)} on {host}.",
            hint="Bundle what the plan of this run asks for.",
        )
    if plan.params_blob not in {None, git_blob(at.params.read_bytes())}:
        raise ParamsError(
            f"{plan_file} was made of another params.yaml than lies here.",
            hint="Measure the commit that was planned.",
        )
    return plan.head


def read_plan(path: Path) -> PlanRecord:
    """
    Read a plan as what it may be: the file of a stranger.

    Raises:
        BundleError: It is not there or none.
    """
    data = read_bounded(path, MAX_BYTES)
    try:
        strict_json.loads(data, limit_bytes=MAX_BYTES)
        return PlanRecord.model_validate_json(data)
    except strict_json.NotJsonError as error:
        raise BundleError(f"{path.name} is no plan: {error.message}.") from None
    except ValidationError as error:
        raise BundleError(f"{path.name} is no plan: {first_flaw(error)}.") from None


def first_flaw(error: ValidationError) -> str:
    """Say where the first thing is that is wrong, and what, as a clause."""
    first = error.errors(include_url=False)[0]
    where = wording.quoted(".".join(map(str, first["loc"])))
    return f"{where}: {console.clean(first['msg'])}"


def git_blob(data: bytes) -> str:
    """Return git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# --- packing ----------------------------------------------------------------------------------


def measured(  # noqa: PLR0913 - each is one fact that only the caller knows
    at: Layout, declared: Declaration, model: str, *, host: str, head: str, remote: str | None
) -> BundleRecord:
    """Compose the bundle of what a run left in this checkout, whole or not."""
    from pipelines import host_records  # noqa: PLC0415 - it reads bundles

    took = times.read(at)
    record = _composed(
        at, declared, model, host=host, head=head, below=None,
        more={
            "remote": remote,
            "times_s": {
                name: wall_s
                for name, wall_s in took.wall_s.items()
                if name in lock_entries.names_of(declared, model)
            },
            "machine": _text(at.machine),
            "toolchain": _text(at.toolchain),
        },
    )  # fmt: skip
    failed = {
        name: f"{name} failed: {console.clean(cause)}"
        for name, cause in took.failed.items()
        if name in lock_entries.names_of(declared, model)
    }
    others = [
        *_changed_ggufs(at, record.ggufs, model),
        *host_records.not_of(at, declared, model, host),
    ]
    # A stage that was not reached ended with nothing.
    codes = {took.codes[name] for name in failed if name in took.codes}
    return record.model_copy(
        update={
            "failures": (*failed.values(), *others),
            "again": codes == {RetryLaterError.exit_code} and not others,
        }
    )


def from_git(
    at: Layout, declared: Declaration, model: str, *, host: str, head: str
) -> BundleRecord:
    """
    Compose the bundle of what the files of a commit hold of a model: an earlier measurement.

    Args:
        at: The checkout, or a tree of a commit.
        declared: What params.yaml says.
        model: Its key.
        host: Its key; one that is measured but is not the first lies in results/MODEL/on/HOST.
        head: Commit that the inputs are those of.
    """
    is_primary = host == primary_host(declared, model)
    return _composed(
        at, declared, model, host=host, head=head, below=None if is_primary else f"on/{host}"
    )


def _composed(  # noqa: PLR0913 - the same
    at: Layout,
    declared: Declaration,
    model: str,
    *,
    host: str,
    head: str,
    below: str | None,
    more: dict[str, Any] | None = None,
) -> BundleRecord:
    own = at.root / "results" / model
    folder = own / below if below else own
    lock = own / below / "lock.json" if below else at.root / lock_entries.NAME
    files = {
        path: text
        for path in bundle_checks.kinds(model)
        if (text := _text(folder / path.split("/", 2)[2]))
    }
    entries = {
        name: entry
        for name, entry in read_lock(lock).items()
        if name in lock_entries.names_of(declared, model)
    }
    took = records.read_or_reason(folder / "times.json", TimesRecord)
    fields: dict[str, Any] = {
        "head": head,
        "model": model,
        "host": host,
        "primary": host == primary_host(declared, model),
        "machine_id": _machine_id(files),
        "toolchain_id": _toolchain_id(entries),
        "lock": entries,
        "files": files,
        "ggufs": _ggufs(files, declared, model),
        "remote": None,
        "times_s": {} if isinstance(took, str) else took.wall_s,
        "toolchain": _text(folder / at.tools_record(model).name),
    }
    return BundleRecord(**(fields | (more or {})))


def read_lock(path: Path) -> dict[str, Any]:
    """
    Read entries of dvc.lock, or of a lock.json that holds those of another host.

    Raises:
        FleetError: It is not what it should be.
    """
    text = _text(path)
    if path.suffix != ".json":
        return lock_entries.parsed(text, path.name)
    try:
        found = strict_json.loads(text.encode(), limit_bytes=MAX_BYTES) if text else {}
    except strict_json.NotJsonError as error:
        raise BundleError(f"{path} holds no entries of dvc.lock: {error.message}.") from None
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    """Read a small text; empty if it is not there or none."""
    try:
        return path.read_bytes().decode() if not path.is_symlink() else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _machine_id(files: dict[str, str]) -> str:
    """Return what the benchmarks say of the hardware; `unknown` if there is none."""
    for path, text in files.items():
        if "/benchmark/" in path:
            try:
                return str(json.loads(text)["machine"]["hw_id"])[:64]
            except (ValueError, KeyError, TypeError):
                continue
    return "unknown"


def _toolchain_id(entries: dict[str, Any]) -> str:
    """Return the md5 that dvc.lock has for work/toolchain.json; `unknown` if it has none."""
    for entry in entries.values():
        for dep in entry.get("deps", []) if isinstance(entry, dict) else []:
            if dep.get("path") == Layout().toolchain.as_posix():
                return str(dep.get("md5"))
    return "unknown"


def _ggufs(files: dict[str, str], declared: Declaration, model: str) -> tuple[FileDigest, ...]:
    found = []
    for type_ in params.quants_of(declared, model).values():
        text = files.get(Layout().quant_record("quantize", model, type_).as_posix(), "")
        try:
            found.append(QuantizeRecord.model_validate_json(text).gguf)
        except ValidationError:
            continue  # said where the record is looked at
    return tuple(found)


def _changed_ggufs(at: Layout, ggufs: Sequence[FileDigest], model: str) -> Iterator[str]:
    """Yield each file that is not the one of its record any more, as a clause."""
    for gguf in ggufs:
        path = at.gguf(model, gguf.name.removesuffix(".gguf"))
        try:
            size_bytes = path.stat().st_size
        except OSError:
            yield f"{path} is not there"
            continue
        is_same = size_bytes == gguf.size_bytes
        if is_same and size_bytes <= _HASHED_AGAIN_BYTES:
            is_same = hashing.digest(path).sha256 == gguf.sha256
        if not is_same:
            yield f"{path} is not the file that was measured: its digest is another"


def _write(path: Path, record: BundleRecord) -> None:
    """Write a bundle that `read` takes, or none."""
    data = json.dumps(
        json.loads(record.model_dump_json()), ensure_ascii=False, allow_nan=False
    ).encode()
    if len(data) > MAX_BYTES:
        largest = sorted(record.files, key=lambda name: len(record.files[name]), reverse=True)[:3]
        raise BundleError(
            f"the records of {record.model} make a bundle of {len(data):,} bytes; {MAX_BYTES:,} "
            f"are allowed. The largest are {wording.listed(largest)}.",
            hint="Fewer quants or fewer repetitions in one model.",
        )
    try:
        read(data, name=path.name)
    except BundleError as error:
        # The gate would refuse it: it gets the cause instead of the records.
        clause = wording.shortened(error.message.rstrip("."), 1000)
        empty = {
            "lock": {},
            "files": {},
            "ggufs": (),
            "times_s": {},
            "machine": "",
            "toolchain": "",
        }
        record = record.model_copy(update=empty | {"failures": (*record.failures, clause)})
        console.warn(error.message)
        data = record.model_dump_json().encode()
    atomic.write_bytes(path, data)


# --- sending the GGUFs ------------------------------------------------------------------------


def _push(
    at: Layout, declared: Declaration, models: Sequence[str]
) -> tuple[str | None, StoreError | None]:
    """Send what a release is made of to the default remote; return its name, or who refused."""
    remote = _default_remote(at)
    if remote is None:
        console.warn(
            "DVC has no default remote: the GGUFs stay on this machine, and whoever publishes "
            "cannot get them. `dvc remote add --default NAME URL` declares one."
        )
        return None, None
    targets = [path for model in models for path in _pushed(at, declared, model) if path.exists()]
    total = sum(_size(path) for path in targets)
    done = 0
    log = at.log("bundle", "push")
    with console.Progress(f"sending to {remote}", total=total / _MIB, unit="MiB") as progress:
        for path in targets:
            progress.update(done / _MIB, path.name)
            try:
                proc.run(
                    [sys.executable, "-m", "dvc", "push", path.relative_to(at.root).as_posix()],
                    log=log,
                    cwd=at.root,
                    env={"DVC_NO_ANALYTICS": "1"},
                )
            except ToolError as error:
                return None, StoreError(
                    f"the remote {remote} of DVC did not take {path.name}. {error.message}",
                    hint="Put its login into the environment of the runner, or correct its "
                    "address: `dvc remote list`.",
                    log=log,
                )
            done += _size(path)
            progress.update(done / _MIB, path.name)
    console.info(f"{wording.counted(len(targets), 'file')} in the remote {remote}")
    return remote, None


def _pushed(at: Layout, declared: Declaration, model: str) -> list[Path]:
    """Return outputs of DVC that a release of a model is made of and that are not in git."""
    keys = params.quants_of(declared, model)
    return [*(at.gguf(model, key) for key in keys), at.imatrix_dir(model)]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def _default_remote(at: Layout) -> str | None:
    done = proc.run(
        [sys.executable, "-m", "dvc", "config", "core.remote"],
        log=at.log("bundle", "push"),
        cwd=at.root,
        env={"DVC_NO_ANALYTICS": "1"},
        ok_codes=_NO_SUCH_OPTION,
    )
    name = done.stdout.strip()
    return name if done.code == 0 and name else None


# --- reading ----------------------------------------------------------------------------------


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """
    Read a file of somebody else: a regular one, and not more of it than allowed.

    Raises:
        BundleError: It is not there, something else, or too large.
    """
    try:
        if path.is_symlink() or not path.is_file():
            why = "is no file" if path.exists() or path.is_symlink() else "is not there"
            raise BundleError(f"{console.clean(path.name)} {why}.")
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
        raise BundleError(f"{console.clean(path.name)} {why}.") from None
    if len(data) > limit_bytes:
        raise BundleError(
            f"{console.clean(path.name)} has more than the {limit_bytes:,} bytes that are allowed."
        )
    return data


def read(source: Path | bytes, *, name: str = "the bundle") -> BundleRecord:
    """
    Read a bundle that anybody may have written.

    Args:
        source: The file, or its bytes.
        name: What the bytes are called in an error.

    Returns:
        A bundle whose every path, record and entry of dvc.lock is of its own model and of the form
        that our stages write. Whether they agree with one another and with a declaration,
        `bundle_checks.agreement` tells.

    Raises:
        BundleError: It is not that; says of which artifact, and why.
    """
    if isinstance(source, Path):
        name = console.clean(source.name)
        source = read_bounded(source, MAX_BYTES)
    try:
        value = strict_json.loads(source, limit_bytes=MAX_BYTES, lines_in=_WITH_LINES)
        record = BundleRecord.model_validate_json(source)
    except strict_json.NotJsonError as error:
        raise BundleError(f"{name} is no bundle: {error.message}.") from None
    except ValidationError as error:
        raise BundleError(f"{name} is no bundle: {first_flaw(error)}.") from None
    assert isinstance(value, dict), "the type says so"
    require_form(record, name)
    return record


def require_form(record: BundleRecord, name: str) -> None:
    """
    Refuse a bundle that holds what none may hold.

    Raises:
        BundleError: Says what, the first of it.
    """
    clause = next(bundle_checks.form(record), None)
    if clause is not None:
        raise BundleError(
            f"{name} is not to be believed: {wording.shortened(clause, 1000)}.",
            hint="Nothing of it was used. Measure again, and look at who can write artifacts.",
        )
