"""
Which stages the records in git do not cover, and why: what a pull request has to measure.

Records cover a stage when everything that dvc.lock says of it is still so: its command, its
resolved parameters, each file that it read, each record that it wrote, the tools. That is what DVC
compares as well, and a test holds the two together, edit by edit. DVC itself is of no use where
this is asked: a hosted clone has no work/, where the resolved parameters, the GGUFs and the facts
about machine and tools lie. `dvc repro --dry --allow-missing` takes each of them for unchanged, so
that a changed gate, and even a removed record, are nothing to it; at a new quant, and at a record
that was edited, it ends with an error instead of a plan (DVC 3.67, tried). So here

- parameters are resolved from params.yaml instead of read from work/params;
- a file in work/ is known by dvc.lock alone, as what one stage wrote and another one read;
- work/toolchain.json is known by its copy beside the records, results/MODEL/toolchain.json: its md5
  has to be that of dvc.lock, and what it says has to be what is declared;
- work/machine.json may be any, but one for all measurements of a model;
- a measurement that was not to be trusted covers nothing: `fleet repro` takes it away.

What follows a stage that has to run may have to run as well: it is told apart by `after quantize`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pipelines import declaration, trees, wording
from pipelines.ci_records import MEASURING, PlannedRun
from pipelines.errors import ParamsError, Problem
from pipelines.layout import Layout
from pipelines.marked_yaml import shown_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pipelines.params import Declaration

GRAPH: Final = "dvc.yaml"
_MACHINE: Final = Layout().machine.as_posix()
_TOOLCHAIN: Final = Layout().toolchain.as_posix()
_KEYED_BY: Final = {"${models}": "models", "${quants}": "quants"}
_LARGEST_BYTES: Final = 16 << 20
_MOST_LEVELS: Final = 5000
_OPENED: Final = re.compile(rb"[\[{](?![\]}])")
# `- - - x`: each of them is a list in a list.
_INLINE: Final = re.compile(rb"(?:[-?:][ \t]+){100}")
_SECTIONS: Final = ("outs", "metrics", "plots")
_DIFFERENCES_SHOWN: Final = 6
_WHY_CHARACTERS: Final = 600


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    One stage of one key, as dvc.yaml describes it.

    Attributes:
        stage: Its stage.
        key: A model or a quant.
        model: That it belongs to.
        cmd: What DVC runs.
        deps: Files and folders that it reads, without parameters.
        slice: File of its resolved parameters.
        outs: Files and folders that it writes.
    """

    stage: str
    key: str
    model: str
    cmd: str
    deps: tuple[str, ...]
    slice: str
    outs: tuple[str, ...]

    @property
    def name(self) -> str:
        """What dvc.lock calls it."""
        return f"{self.stage}@{self.key}"


# --- what there is to look at -----------------------------------------------------------------


def steps_of(declared: Declaration, path: Path) -> dict[str, Step]:
    """
    Read from dvc.yaml what measures the declared models, by name, in the order of the graph.

    Raises:
        ParamsError: It is not the graph of this version: a stage is missing or has another form.
    """
    stages = _mapping(_yaml(path), "stages")
    found: dict[str, Step] = {}
    for stage in MEASURING:
        entry = _mapping(stages, stage)
        keyed_by, do = _KEYED_BY.get(str(entry.get("foreach"))), _mapping(entry, "do")
        if keyed_by is None or not do:
            raise ParamsError(
                f"{path.name} has no stage `{stage}` for each model or quant.",
                hint=f"{path.name} is not edited to add a model: take that of the template.",
            )
        for key, item in getattr(declared, keyed_by).items():
            model = key if keyed_by == "models" else item.model
            words = {"key": key, "item.model": model, "item.type": getattr(item, "type", "")}
            step = Step(
                stage=stage,
                key=key,
                model=model,
                cmd=_filled(str(do.get("cmd")), words),
                deps=tuple(_filled(one, words) for one in _paths(do.get("deps"))),
                slice="".join(_filled(one, words) for one in _paths(do.get("params"))),
                outs=tuple(_filled(p, words) for kind in _SECTIONS for p in _paths(do.get(kind))),
            )
            found[step.name] = step
    return found


def _filled(text: str, words: Mapping[str, str]) -> str:
    """Put values in the place of `${key}`, as DVC does."""
    for name, value in words.items():
        text = text.replace(f"${{{name}}}", value)
    return text


def _paths(entries: object) -> Iterator[str]:
    """Yield the paths of a list of dvc.yaml, in which each may have options: `- path: {...}`."""
    for entry in entries if isinstance(entries, list) else ():
        yield str(next(iter(entry), "")) if isinstance(entry, dict) else str(entry)


def _yaml(path: Path) -> Any:  # noqa: ANN401 - any YAML value
    """
    Read YAML as DVC does: version 1.2, each key once.

    Returns:
        None if there is no such file.

    Raises:
        ParamsError: It is not YAML; says on which line.
    """
    import yaml  # noqa: PLC0415 - 20 ms

    try:
        data = path.read_bytes()
        _require_shallow(data)
        # What it builds are plain values: the loader is a SafeLoader.
        return yaml.load(data, _loader())  # noqa: S506
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        cause = getattr(error, "problem", None) or type(error).__name__
        where = Problem(
            shown_name(path),
            mark.line + 1 if mark else 1,
            mark.column + 1 if mark else 1,
            f"cannot be read: {wording.quoted(str(cause))}. Two branches merged by text? "
            "`git checkout origin/main -- dvc.lock`, then `fleet repro`",
        )
        raise ParamsError(str(where), problems=[where]) from error


def _require_shallow(data: bytes) -> None:
    """
    Refuse what is nested so deeply that a parser written in C would die of it, without a word.

    libyaml's callers, ruamel.yaml's among them, fall at about 30,000 levels. Indentation needs a
    file larger than any lock for that.

    Raises:
        ValueError: It is, or it is larger than any lock.
    """
    import yaml  # noqa: PLC0415 - 20 ms

    if len(data) > _LARGEST_BYTES or _INLINE.search(data):
        raise ValueError
    if len(_OPENED.findall(data)) <= _MOST_LEVELS:
        return
    depth = 0
    for each in yaml.parse(data, _loader()):
        depth += isinstance(each, yaml.CollectionStartEvent)
        depth -= isinstance(each, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ValueError


@cache
def _loader() -> Any:  # noqa: ANN401 - a class of PyYAML, with or without libyaml
    """
    Return PyYAML's loader, taught version 1.2, in which `yes` is a word and 1e-05 a number.

    ruamel.yaml, by which DVC reads, knows it by itself and takes four times as long: for a fleet of
    20 models and 5 quants 0.6 s, longer than everything else here.
    """
    import yaml  # noqa: PLC0415 - 20 ms

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - PyYAML's
            found = super().construct_mapping(node, deep)
            if len(found) != len(node.value):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is there twice", node.start_mark
                )
            return found

    for tag, pattern, first in _VALUES:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", _whole)
    return Loader


# The core schema of YAML 1.2 as ruamel.yaml has it (ruamel/yaml/resolver.py).
_VALUES: Final = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    (
        "float",
        (
            r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
            r"|[-+]?\.[0-9_]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
    ("int", r"^[-+]?(?:0b[01_]+|0o[0-7_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$", "-+0123456789"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
)


def _whole(_loader: object, node: Any) -> int:  # noqa: ANN401 - PyYAML's
    """Read a whole number; a leading zero means nothing in this version."""
    text = str(node.value).replace("_", "")
    return int(text, 0 if text.lstrip("+-")[:2] in {"0b", "0o", "0x"} else 10)


def _mapping(value: object, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


@dataclass
class _Held:
    """
    What git holds for one host.

    Attributes:
        root: Folder of the records.
        files: Folder of everything else that stages read.
        below: What lies between results/MODEL and the records of this host: "" or `on/HOST`.
        lock: Entries of dvc.lock by name.
    """

    root: Path
    files: Path
    below: str
    lock: dict[str, Any]
    _md5s: dict[str, str | None] = field(default_factory=dict)

    def path(self, path: str) -> Path:
        """Return where a file that the graph names lies for this host."""
        parts = path.split("/")
        if parts[0] != trees.RESULTS:
            return self.files / path
        return self.root.joinpath(*parts[:2], *self.below.split("/"), *parts[2:])

    def spelled(self, path: str) -> str:
        """Return a path of the graph as it is for this host."""
        inside = self.root if path.startswith(f"{trees.RESULTS}/") else self.files
        return self.path(path).relative_to(inside).as_posix()

    def md5(self, path: str) -> str | None:
        """Return the md5 of a file or folder as DVC computes it; None if it is not there."""
        if path not in self._md5s:
            self._md5s[path] = _md5_of(self.path(path))
        return self._md5s[path]

    def locked(self, step: Step, kind: str) -> dict[str, str]:
        """Return the md5 of each file that dvc.lock names for a step, by its path."""
        entries = self.entry(step).get(kind)
        return {
            str(each["path"]): str(each.get("md5"))
            for each in (entries if isinstance(entries, list) else ())
            if isinstance(each, dict) and "path" in each
        }

    def entry(self, step: Step) -> dict[str, Any]:
        """Return what dvc.lock says of a step; nothing if it says nothing that can be read."""
        found = self.lock.get(step.name)
        return found if isinstance(found, dict) else {}


def _md5_of(path: Path) -> str | None:
    if path.is_dir():
        files = {
            each.relative_to(path).as_posix(): file_md5(each)
            for each in sorted(path.rglob("*"))
            if each.is_file()
        }
        # A name that git cannot keep is none that DVC would have seen.
        return folder_md5(files) if files else None
    return file_md5(path) if path.is_file() else None


def file_md5(path: Path) -> str:
    """Return DVC's name of a file."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def folder_md5(files: Mapping[str, str]) -> str:
    """
    Return DVC's name of a folder (dvc_data/hashfile/tree.py): md5 of the JSON that lists it.

    Args:
        files: md5 of each file by its path below the folder.
    """
    listed = [{"md5": files[path], "relpath": path} for path in sorted(files)]
    text = json.dumps(listed, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


# --- what is not covered ----------------------------------------------------------------------


class Coverage:
    """
    What the records in git cover of a declaration.

    Nothing is written, no program is started, and no file in work/ is looked at.
    """

    def __init__(self, declared: Declaration, at: Layout, *, files: Path | None = None) -> None:
        """
        Look at a checkout, or at a tree of records of one.

        Args:
            declared: The declaration, checked against the files that it names.
            at: Where dvc.lock and results/ lie.
            files: Where dvc.yaml, corpora and Modelfiles lie; the same folder if absent.

        Raises:
            ParamsError: dvc.yaml or dvc.lock cannot be read.
        """
        self._declared = declared
        self._root = at.root
        self._files = files or at.root
        self._steps = steps_of(declared, self._files / GRAPH)
        self._slices = {
            f"{stage}@{key}": json.loads(slice_.model_dump_json())
            for (stage, key), slice_ in declaration.slices(declared).items()
            if stage in MEASURING
        }
        lock = _mapping(_yaml(at.root / trees.LOCK), "stages")
        self._primary = _Held(at.root, self._files, "", lock)

    def runs(self, model: str, *, host: str | None = None) -> tuple[PlannedRun, ...]:
        """
        Return what has to run of a model, in the order of the graph; nothing if all is covered.

        Args:
            model: A declared one.
            host: A measured host that is not the primary one; its records are those of
                results/MODEL/on/HOST.
        """
        held = self._primary if host is None else self._of_host(model, host)
        steps = [step for step in self._steps.values() if step.model == model]
        machine = _common(held.locked(step, "deps").get(_MACHINE) for step in steps)
        why: dict[str, str] = {}
        for step in steps:
            before = [one for one in steps if one.name in why and _feeds(one, step)]
            stages = {one.stage for one in before}
            own = list(self._reasons(step, steps, held, machine, before))
            if not own and stages:
                ordered: list[str] = [stage for stage in MEASURING if stage in stages]
                own = [f"after {wording.listed(ordered)}"]
            if own:
                why[step.name] = wording.shortened("; ".join(own), _WHY_CHARACTERS)
        return tuple(
            PlannedRun(stage=step.stage, key=step.key, why=why[step.name])
            for step in steps
            if step.name in why
        )

    def machine_md5s(self, model: str) -> frozenset[str]:
        """Return by which md5 dvc.lock knows the machines on which a model was measured."""
        return self._md5s_read(model, _MACHINE)

    def tools_md5s(self, model: str) -> frozenset[str]:
        """Return by which md5 dvc.lock knows the tools that made the records of a model."""
        return self._md5s_read(model, _TOOLCHAIN)

    def _md5s_read(self, model: str, path: str) -> frozenset[str]:
        steps = (step for step in self._steps.values() if step.model == model)
        return frozenset(
            md5 for step in steps if (md5 := self._primary.locked(step, "deps").get(path))
        )

    def held(self, model: str, *, host: str | None = None) -> dict[str, object]:
        """
        Return what git holds of a model: equal ones are judged equally.

        Args:
            model: A declared one.
            host: As for `runs`.

        Returns:
            md5 of each record by its path, entry of dvc.lock by the name of the stage.
        """
        from pipelines.bundle_checks import kinds  # noqa: PLC0415 - which reads the graph by us

        found = self._primary if host is None else self._of_host(model, host)
        records = (*kinds(model), Layout().tools_record(model).as_posix())
        return {path: found.md5(path) for path in records} | {
            step.name: found.entry(step) for step in self._steps.values() if step.model == model
        }

    def _of_host(self, model: str, host: str) -> _Held:
        below = f"on/{host}"
        path = self._root / trees.RESULTS / model / below / "lock.json"
        try:
            lock = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            lock = None
        return _Held(self._root, self._files, below, lock if isinstance(lock, dict) else {})

    def _reasons(
        self, step: Step, steps: list[Step], held: _Held, machine: str | None, before: list[Step]
    ) -> Iterator[str]:
        """Yield why a step is not covered, less what is only a consequence of those before it."""
        entry = held.entry(step)
        if not entry:
            yield self._nothing(step, held)
            return
        if entry.get("cmd") != step.cmd:
            yield "its command is another one"
        told = _mapping(_mapping(entry, "params"), step.slice)
        yield from _first(_read_otherwise(told, self._slices[step.name]))
        yield from _inputs(step, steps, held, before)
        yield from _outputs(step, held)
        if (md5 := held.locked(step, "deps").get(_MACHINE)) is not None and md5 != machine:
            yield "it was measured on another machine than the rest of the model"
        if _TOOLCHAIN in step.deps:
            yield from self._tools(step, held)
        yield from distrusted(step.stage, held.path(step.outs[0]))

    def _nothing(self, step: Step, held: _Held) -> str:
        """Say of a step that dvc.lock does not know why that may be."""
        if any(held.path(out).exists() for out in step.outs if out.startswith(trees.RESULTS)):
            return "dvc.lock has no entry of it"
        if step.key == step.model:
            return f"{step.model} was never measured" if not held.below else "never measured there"
        return f"{step.key.removeprefix(f'{step.model}-')} is new"

    def _tools(self, step: Step, held: _Held) -> Iterator[str]:
        """Hold the tools that a step ran with against the declared ones."""
        path = Layout().tools_record(step.model).as_posix()
        md5 = held.md5(path)
        if md5 is None:
            yield f"nothing in git says which tools made it: {held.spelled(path)} is missing"
            return
        if held.locked(step, "deps").get(_TOOLCHAIN) != md5:
            yield f"it was made by other tools than {held.spelled(path)} tells of"
            return
        yield from other_tools(held.path(path).read_bytes(), self._declared)


def _common(values: Iterable[str | None]) -> str | None:
    """Return the most frequent value; of several the first."""
    counted = Counter(value for value in values if value is not None)
    return counted.most_common(1)[0][0] if counted else None


def measured_on(steps: Sequence[Step]) -> tuple[str, ...]:
    """
    Return the names of what depends on the machine: what is measured there, and what reads it.

    Args:
        steps: Of one model, in the order of the graph.
    """
    found: list[Step] = []
    for step in steps:
        if _MACHINE in step.deps or any(_feeds(one, step) for one in found):
            found.append(step)
    return tuple(step.name for step in found)


def _feeds(one: Step, other: Step) -> bool:
    """Tell whether a step reads something that another one writes; folders hold what is in them."""
    return any(_is_of([one], dep) for dep in other.deps)


def _is_of(steps: list[Step], dep: str) -> bool:
    return any(
        dep == out or out.startswith(f"{dep}/") or dep.startswith(f"{out}/")
        for step in steps
        for out in step.outs
    )


def _first(lines: list[str]) -> Iterator[str]:
    """Yield the first of many lines, and how many more there are."""
    yield from lines[:_DIFFERENCES_SHOWN]
    if more := lines[_DIFFERENCES_SHOWN:]:
        yield f"{wording.counted(len(more), 'more change')}"


def _read_otherwise(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say in what the parameters of a step differ; a quant more or less by its type."""
    old, new = _mapping(before, "quants"), _mapping(after, "quants")
    lines = [f"{type_} is new" for key, type_ in new.items() if old.get(key) != type_]
    lines += [f"{_shown(type_)} is gone" for key, type_ in old.items() if new.get(key) != type_]
    lines += differences(
        {name: value for name, value in before.items() if name != "quants" or not lines},
        {name: value for name, value in after.items() if name != "quants" or not lines},
    )
    return lines


def _inputs(step: Step, steps: list[Step], held: _Held, before: list[Step]) -> Iterator[str]:
    """Hold what a step read, by dvc.lock, against what is there or what another step wrote."""
    told = held.locked(step, "deps")
    # What the graph does not name any more is nothing to DVC either, and stays in its lock.
    if not set(told) >= set(step.deps):
        yield "it reads other files than it did"
    for dep in step.deps:
        if dep in {_MACHINE, _TOOLCHAIN} or dep not in told or _is_of(before, dep):
            continue
        now = _written(dep, steps, held) if dep.startswith("work/") else held.md5(dep)
        if now == told[dep]:
            continue
        if now is None:
            yield f"{held.spelled(dep)} is missing"
        elif dep.startswith(("work/", f"{trees.RESULTS}/")):
            yield f"it read another {held.spelled(dep)}"
        else:
            yield f"{dep} changed"


def _written(dep: str, steps: list[Step], held: _Held) -> str | None:
    """Return the md5 of a file or folder in work/, by what dvc.lock says was written there."""
    below: dict[str, str] = {}
    for step in steps:
        for out, md5 in held.locked(step, "outs").items():
            if out == dep:
                return md5
            if out.startswith(f"{dep}/") and out in step.outs:
                below[out.removeprefix(f"{dep}/")] = md5
    return folder_md5(below) if below else None


def _outputs(step: Step, held: _Held) -> Iterator[str]:
    """Hold what a step wrote, by dvc.lock, against the records that are there."""
    told = held.locked(step, "outs")
    if not set(told) >= set(step.outs):
        yield "it writes other files than it did"
    for out in step.outs:
        if out not in told or not out.startswith(f"{trees.RESULTS}/"):
            continue
        now = held.md5(out)
        if now is None:
            yield f"{held.spelled(out)} is missing"
        elif now != told[out]:
            yield f"{held.spelled(out)} is not the file that dvc.lock knows: it was edited"


def other_tools(manifest: bytes, declared: Declaration) -> Iterator[str]:
    """
    Say in what the tools that made records differ from the declared ones, as clauses.

    Args:
        manifest: Bytes of work/toolchain.json.
        declared: The declaration; a backend `auto` is whatever the machine has.
    """
    try:
        found = json.loads(manifest)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        yield "what git says of its tools cannot be read"
        return
    section = declared.toolchain
    wanted = {
        "llama_cpp_python": ("llama_cpp_python", section.llama_cpp_python),
        "sha256": ("sdist_sha256", section.sha256),
        "backend": ("backend", section.backend),
    }
    for name, (key, value) in wanted.items():
        before = found.get(key)
        if before != value and not (name == "backend" and value == "auto"):
            yield f"toolchain.{name} {_shown(before)} -> {_shown(value)}"


def distrusted(stage: str, path: Path) -> Iterator[str]:
    """
    Say why a measurement has to be repeated although nothing changed, as a clause.

    Args:
        stage: That wrote it; all but `benchmark` and `load-test` measure nothing that a busy
            machine changes.
        path: Its record; one that is not there is not judged.
    """
    from pipelines import load_records, records  # noqa: PLC0415 - pydantic

    if stage not in {"benchmark", "load-test"} or not path.exists():
        return
    try:
        if stage == "benchmark":
            valid = records.read(path, records.BenchmarkRecord).validity.verdict == "VALID"
        else:
            winners = records.read(path, load_records.LoadTestRecord).winners
            valid = not any(one.invalid for one in winners)
    except records.RecordError:
        yield "its record cannot be read by this version"
        return
    if not valid:
        yield "the measurement was INVALID"


# Of a whole entry of these sections one word says more than its values.
_OF_HOSTS: Final = {"hosts": "host {} is", "slos": "slos of host {} are"}


# --- differences ------------------------------------------------------------------------------


def differences(before: object, after: object, at: str = "") -> list[str]:
    """
    Say in which values two declarations, or two parts of them, differ: `gates.x 0.05 -> 0.02`.

    Args:
        before: Plain data.
        after: Plain data.
        at: Where both are, for the text.
    """
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), after.get(key), f"{at}.{key}" if at else key)
        ]
    section, _, name = at.partition(".")
    if section in _OF_HOSTS and name and "." not in name and None in (before, after):
        return [f"{_OF_HOSTS[section].format(name)} {'new' if before is None else 'gone'}"]
    return [f"{at} {_shown(before)} -> {_shown(after)}".strip()]


def _shown(value: object) -> str:
    """Write a value as params.yaml would; a long one is cut, a digest has its first digits."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return wording.declared(value)
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) in {40, 64} and set(text) <= set("0123456789abcdef"):
        return text[:7]
    return text if text.isidentifier() else wording.quoted(text).strip('"') or '""'
