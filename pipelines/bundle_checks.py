"""
Whether a bundle may be believed: its form, and that everything in it speaks of the same bytes.

A stranger may have written it. What it may hold is a closed list, so that nothing has to be thought
of that it may not: records under exactly the names that the stages of its own model write, each of
its own type; entries of dvc.lock of exactly these stages, with their own command and paths. What it
says has to agree with itself: the md5 of a record's text with dvc.lock, the digest of each GGUF
along the chain, the hardware of every number, the tools with the declaration.

Everything found is a sentence; nothing here raises for what a bundle says.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from pipelines import coverage, declaration, lock_entries, machine, params, strict_json, wording
from pipelines.ci_records import MEASURING
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.evaluate_records import EvaluateRecord
from pipelines.layout import Layout
from pipelines.load_records import LoadTestRecord, SweepRecord
from pipelines.records import (
    BenchmarkRecord,
    CalibrateRecord,
    ChoiceRecord,
    ConvertRecord,
    FetchRecord,
    Part,
    QuantizeRecord,
    Record,
)
from pipelines.verify_records import VerifyRecord

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.ci_records import BundleRecord
    from pipelines.params import Declaration

_TYPES: Final[tuple[str, ...]] = get_args(params.QuantType)
_RECORDS: Final[dict[str, type[Record]]] = {
    "fetch": FetchRecord,
    "convert": ConvertRecord,
    "verify": VerifyRecord,
    "calibrate": CalibrateRecord,
    "evaluate": EvaluateRecord,
    "choose": ChoiceRecord,
    "load-test": LoadTestRecord,
}
# Rows and numbers for `dvc plots` and `dvc metrics diff`: nobody decides by them.
_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Word = Annotated[str, StringConstraints(max_length=200)]
_TREE: Final = TypeAdapter[Any](dict[_Word, dict[_Word, _Number]])
_ROWS: Final = TypeAdapter[Any](list[dict[_Word, bool | _Number | _Word]])
_MACHINE: Final = "work/machine.json"
_TOOLCHAIN: Final = "work/toolchain.json"
_SHARED: Final = frozenset({_MACHINE, _TOOLCHAIN, "corpora/prompts.yaml", "modelfiles"})
# That of this code: whoever judges a stranger's bundle does not take the stranger's graph.
_GRAPH: Final = Path(__file__).resolve().parent.parent / "dvc.yaml"
# A whole text of a record; the largest known, a comparison with all its samples, has a third of it.
_RECORD_BYTES: Final = 768 << 10
_LONGEST_STAGE_S: Final = 30 * 86_400.0
# Text of a model lies in records of load tests; it is escaped where it is shown.
_ANY_LINES: Final = frozenset("*")


class _Locked(Part):
    """One dependency or output in dvc.lock."""

    path: Annotated[str, StringConstraints(max_length=300)]
    hash: Literal["md5"]
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}(?:\.dir)?$")]
    size: Annotated[int, Field(ge=0, le=1 << 60)]
    nfiles: Annotated[int, Field(ge=0, le=1 << 31)] | None = None


class _Entry(Part):
    """One entry of dvc.lock as DVC writes those of our stages."""

    cmd: Annotated[str, StringConstraints(max_length=300)]
    deps: tuple[_Locked, ...] = ()
    params: dict[str, dict[str, Any]]
    outs: tuple[_Locked, ...]


# --- what there may be ------------------------------------------------------------------------


def kinds(model: str) -> dict[str, type[Record] | TypeAdapter[Any]]:
    """Return the type of every record that the measuring stages of a model write, by its path."""
    at = Layout()
    found: dict[str, type[Record] | TypeAdapter[Any]] = {
        at.model_record(stage, model).as_posix(): kind for stage, kind in _RECORDS.items()
    }
    found[at.metrics(model).as_posix()] = _TREE
    found[at.load_metrics(model).as_posix()] = _TREE
    found[at.frontier(model).as_posix()] = _ROWS
    found[at.comparison(model).as_posix()] = CompareRecord
    found[at.engine_record(model).as_posix()] = EngineRecord
    for type_ in _TYPES:
        found[at.quant_record("quantize", model, type_).as_posix()] = QuantizeRecord
        found[at.quant_record("benchmark", model, type_).as_posix()] = BenchmarkRecord
        found[at.sweep_record(model, type_).as_posix()] = SweepRecord
    return found


def stages(model: str) -> tuple[str, ...]:
    """Return every stage that a bundle of a model may speak of, as dvc.lock spells them."""
    keys = [f"{model}-{type_}" for type_ in _TYPES]
    return tuple(
        f"{stage}@{key}"
        for stage in MEASURING
        for key in (keys if stage in lock_entries.BY_QUANT else [model])
    )


# --- form -------------------------------------------------------------------------------------


def form(bundle: BundleRecord) -> Iterator[str]:
    """Yield what a bundle holds that it may not, as clauses."""
    allowed = kinds(bundle.model)
    for path, text in bundle.files.items():
        kind = allowed.get(path)
        if kind is None:
            yield f"{wording.quoted(path)} is no record that the stages of {bundle.model} write"
        else:
            yield from _record_form(path, text, kind, bundle.model)
    known = set(stages(bundle.model))
    for name, entry in bundle.lock.items():
        if name not in known:
            yield f"{wording.quoted(name)} is no stage that measures {bundle.model}"
        else:
            yield from _entry_form(name, entry, bundle.model)
    for name, wall_s in bundle.times_s.items():
        if name not in known or not 0 <= wall_s <= _LONGEST_STAGE_S:
            yield f"{wording.quoted(name)} cannot have taken {wall_s:.6g} s"
    names = [gguf.name for gguf in bundle.ggufs]
    if len(set(names)) != len(names):
        yield "a GGUF is named twice"
    for name in names:
        if name not in {f"{bundle.model}-{type_}.gguf" for type_ in _TYPES}:
            yield f"{wording.quoted(name)} is no GGUF of {bundle.model}"


def _record_form(
    path: str, text: str, kind: type[Record] | TypeAdapter[Any], model: str
) -> Iterator[str]:
    data = text.encode()
    try:
        value = strict_json.loads(data, limit_bytes=_RECORD_BYTES, lines_in=_ANY_LINES)
        if isinstance(kind, TypeAdapter):
            kind.validate_python(value)
            return
        record: Any = kind.model_validate_json(data)
    except strict_json.NotJsonError as error:
        yield f"{path}: {error.message}"
        return
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        named = kind.__name__ if isinstance(kind, type) else "record of numbers"
        yield f"{path} is not a {named}: {wording.quoted(where)}: {first['msg']}"
        return
    if record.model != model:
        yield f"{path} speaks of another model, {wording.quoted(record.model)}"
    stem = path.rpartition("/")[2].removesuffix(".json").removesuffix(".gpu-layers")
    if path.count("/") > 2 and record.type != stem:  # noqa: PLR2004 - results/M/stage/TYPE.json
        yield f"{path} speaks of another quant, {wording.quoted(str(record.type))}"


def _entry_form(name: str, entry: object, model: str) -> Iterator[str]:
    try:
        found = _Entry.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = wording.quoted(".".join(map(str, first["loc"])))
        yield f"entry {name} of dvc.lock is not what DVC writes: {where}: {first['msg']}"
        return
    stage, _, key = name.partition("@")
    if found.cmd != f"python -m pipelines {stage} {key}":
        yield f"entry {name} of dvc.lock runs {wording.quoted(found.cmd)}"
    slice_ = f"work/params/{stage}/{key}.json"
    if list(found.params) != [slice_]:
        yield f"entry {name} of dvc.lock reads other parameters than {slice_}"
    for each in (*found.deps, *found.outs):
        if not _is_own(each.path, model) and (each in found.outs or each.path not in _SHARED):
            yield f"entry {name} of dvc.lock names {wording.quoted(each.path)}, not of {model}"


def _is_own(path: str, model: str) -> bool:
    """Tell whether a path is one below the folders of a model, spelt in the one way there is."""
    name = "[A-Za-z0-9_][A-Za-z0-9._-]*"
    return (
        re.fullmatch(rf"(?:results|work)/{re.escape(model)}/{name}(?:/{name})?", path) is not None
    )


# --- agreement --------------------------------------------------------------------------------


def agreement(bundle: BundleRecord, declared: Declaration, *, measured: bool) -> Iterator[str]:
    """
    Yield what in a bundle does not fit together, or not to the declaration, as sentences.

    Args:
        bundle: Of good form.
        declared: What params.yaml says.
        measured: Whether it comes from a machine; one that git tells of has not the text of
            work/machine.json.
    """
    whose = f"{bundle.model} on {bundle.host}"
    for clause in bundle.failures:
        yield wording.sentence(f"{whose}: {clause}")
    if bundle.model not in declared.models:
        yield f"{whose}: the model is not declared."
        return
    expected = lock_entries.names_of(declared, bundle.model)
    if missing := [name for name in expected if name not in bundle.lock]:
        yield f"{whose}: dvc.lock has no entry of {wording.first_few(missing)}: it was not made."
    if foreign := [name for name in bundle.lock if name not in expected]:
        yield f"{whose}: {wording.first_few(foreign)} is not declared."
    steps = coverage.steps_of(declared, _GRAPH)
    entries = {
        name: _of_graph(_Entry.model_validate(entry), steps[name])
        for name, entry in bundle.lock.items()
        if name in expected
    }
    yield from (f"{whose}: {clause}." for clause in _paths(entries, steps))
    yield from (f"{whose}: {clause}." for clause in _files(bundle, entries))
    yield from (f"{whose}: {clause}." for clause in _links(bundle, entries))
    yield from (f"{whose}: {clause}." for clause in _slices(entries, declared))
    yield from (f"{whose}: {clause}." for clause in _ggufs(bundle, entries, declared))
    yield from (f"{whose}: {clause}." for clause in _hardware(bundle, entries, measured=measured))
    yield from (f"{whose}: {clause}." for clause in _tools(bundle, entries, declared))


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _of_graph(entry: _Entry, step: coverage.Step) -> _Entry:
    """Leave out what the graph does not name any more: DVC compares it no more, and keeps it."""
    kept = {
        "deps": tuple(each for each in entry.deps if each.path in step.deps),
        "outs": tuple(each for each in entry.outs if each.path in step.outs),
    }
    return entry.model_copy(update=kept)


def _paths(entries: Mapping[str, _Entry], steps: Mapping[str, coverage.Step]) -> Iterator[str]:
    """Hold what each stage read and wrote against the graph: what is not named, nobody compares."""
    for name, entry in entries.items():
        for what, found, due in (
            ("reads", entry.deps, steps[name].deps),
            ("writes", entry.outs, steps[name].outs),
        ):
            if sorted(each.path for each in found) != sorted(due):
                odd = sorted({each.path for each in found} ^ set(due))
                yield (
                    f"{name} {what} other files in dvc.lock than in dvc.yaml "
                    f"({wording.first_few(odd) or 'one of them twice'})"
                )


def _files(bundle: BundleRecord, entries: Mapping[str, _Entry]) -> Iterator[str]:
    """Hold every record against the output that dvc.lock says it is."""
    told: set[str] = set()
    for name, entry in entries.items():
        for out in entry.outs:
            if not out.path.startswith("results/"):
                continue
            told.add(out.path)
            text = bundle.files.get(out.path)
            if text is None:
                yield f"{out.path}, which {name} wrote, is missing"
            elif (_md5(text), len(text.encode())) != (out.md5, out.size):
                yield f"{out.path} is not what {name} wrote: its md5 is not that of dvc.lock"
    at = Layout()
    beside = {each(bundle.model).as_posix() for each in (at.comparison, at.engine_record)}
    beside |= {at.sweep_record(bundle.model, type_).as_posix() for type_ in _TYPES}
    for path in bundle.files:
        if path not in told | beside:
            yield f"no stage of dvc.lock wrote {path}"


def _links(bundle: BundleRecord, entries: Mapping[str, _Entry]) -> Iterator[str]:
    """Hold what each stage read against what the one before it wrote."""
    written = {out.path: out.md5 for entry in entries.values() for out in entry.outs}
    # A sweep lies beside the benchmarks, and `choose` reads the folder.
    written = {path: _md5(text) for path, text in bundle.files.items()} | written
    for name, entry in entries.items():
        for dep in entry.deps:
            wanted = written.get(dep.path)
            if dep.md5.endswith(".dir") and wanted is None and dep.path not in _SHARED:
                inside = f"{dep.path}/"
                listed = {
                    path.removeprefix(inside): md5
                    for path, md5 in written.items()
                    if path.startswith(inside)
                }
                wanted = coverage.folder_md5(listed)
            if wanted is None and dep.path not in _SHARED:
                yield f"{name} read {dep.path}, which no stage wrote"
            elif wanted is not None and wanted != dep.md5:
                yield f"{name} read another {dep.path} than there is now"


def _slices(entries: Mapping[str, _Entry], declared: Declaration) -> Iterator[str]:
    """Hold the parameters that each stage read against those that are declared."""
    wanted = declaration.slices(declared)
    for name, entry in entries.items():
        stage, _, key = name.partition("@")
        due = json.loads(wanted[stage, key].model_dump_json())
        found = next(iter(entry.params.values()))
        # As text: to Python, true is equal to 1.
        if json.dumps(found, sort_keys=True) != json.dumps(due, sort_keys=True):
            differing = sorted({*found, *due} - {k for k in found if found[k] == due.get(k, ...)})
            yield (
                f"{name} was run with other parameters than params.yaml declares "
                f"({wording.first_few(differing) or 'true for 1'})"
            )


def _ggufs(
    bundle: BundleRecord, entries: Mapping[str, _Entry], declared: Declaration
) -> Iterator[str]:
    """Hold the digests of each GGUF against one another: record, dvc.lock, bundle."""
    named = {gguf.name: gguf for gguf in bundle.ggufs}
    at = Layout()
    for key, type_ in params.quants_of(declared, bundle.model).items():
        text = bundle.files.get(at.quant_record("quantize", bundle.model, type_).as_posix())
        if text is None or f"quantize@{key}" not in entries:
            continue
        gguf = QuantizeRecord.model_validate_json(text).gguf
        path = at.gguf(bundle.model, key).as_posix()
        out = next((o for o in entries[f"quantize@{key}"].outs if o.path == path), None)
        if gguf.name != f"{key}.gguf" or named.get(gguf.name) != gguf:
            yield f"{key}.gguf is not named with the digest of quantize/{type_}.json"
        if out is None or (out.md5, out.size) != (gguf.md5, gguf.size_bytes):
            yield f"{key}.gguf in dvc.lock is not that of quantize/{type_}.json"


def _read(text: str, path: str) -> tuple[dict[str, Any], str]:
    """Read a small file of work/; a clause tells what is wrong with it."""
    try:
        value = strict_json.loads(text.encode(), limit_bytes=_RECORD_BYTES)
    except strict_json.NotJsonError as error:
        return {}, f"{path}: {error.message}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path} holds no object")


def _shared(entries: Mapping[str, _Entry], path: str) -> dict[str, str]:
    return {
        name: dep.md5 for name, entry in entries.items() for dep in entry.deps if dep.path == path
    }


def _hardware(
    bundle: BundleRecord, entries: Mapping[str, _Entry], *, measured: bool
) -> Iterator[str]:
    """Every number of a host is from one machine, the one that the bundle names."""
    for path, text in bundle.files.items():
        kind = kinds(bundle.model)[path]
        if kind in {BenchmarkRecord, LoadTestRecord}:
            record: Any = json.loads(text)
            if record["machine"]["hw_id"] != bundle.machine_id:
                yield f"{path} was measured on another machine than the bundle names"
    seen = set(_shared(entries, _MACHINE).values())
    if len(seen) > 1:
        yield f"its stages ran on {len(seen)} machines"
    if not measured:
        return
    facts, wrong = _read(bundle.machine, _MACHINE)
    if wrong:
        yield wrong
        return
    hardware = {k: v for k, v in facts.items() if k not in {"schema_version", "hw_id"}}
    if not facts.get("hw_id") == bundle.machine_id == machine.facts_id(hardware):
        yield f"{_MACHINE} is not of the machine that the bundle names"
    if seen - {_md5(bundle.machine)}:
        yield f"{_MACHINE} is not the one of dvc.lock"


def _tools(
    bundle: BundleRecord, entries: Mapping[str, _Entry], declared: Declaration
) -> Iterator[str]:
    """Every number was made by the declared toolchain."""
    seen = _shared(entries, _TOOLCHAIN)
    if set(seen.values()) - {bundle.toolchain_id}:
        other = [name for name, md5 in seen.items() if md5 != bundle.toolchain_id]
        yield f"{wording.first_few(other)} ran with another toolchain than the bundle names"
    commits = {
        str(record["llama_cpp_commit"])
        for record in map(json.loads, bundle.files.values())
        if isinstance(record, dict)
        and "llama_cpp_commit" in record
        and record.get("stage") != "compare"
    }
    if len(commits) > 1:
        yield f"its records are of {len(commits)} commits of llama.cpp"
    manifest, wrong = _read(bundle.toolchain, _TOOLCHAIN)
    if wrong:
        yield wrong
        return
    if _md5(bundle.toolchain) != bundle.toolchain_id:
        yield f"{_TOOLCHAIN} is not the one of dvc.lock"
    spec = declared.toolchain
    found = (manifest.get("llama_cpp_python"), manifest.get("sdist_sha256"))
    if found != (spec.llama_cpp_python, spec.sha256):
        yield (
            f"the toolchain was llama-cpp-python {wording.quoted(str(found[0]))}, not "
            f"{spec.llama_cpp_python} as declared"
        )
    if commits - {str(manifest.get("llama_cpp_commit"))}:
        yield "its records are of another llama.cpp than its toolchain"
