"""
Who champion and challenger are, and how their bytes come here.

The challenger is this checkout's. The champion is what a commit chose, read from git as it was
then, or what a release of the local registry holds. Whatever way a file comes (work/, DVC's cache,
the registry, a remote, made again from that commit), it is believed for its sha256 alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from pydantic import ValidationError

from pipelines import (
    atomic,
    console,
    dvc_state,
    hashing,
    marked_yaml,
    params,
    proc,
    records,
    release_records,
    toolchain,
    trees,
    wording,
)
from pipelines.compare_records import Side
from pipelines.errors import FleetError, MachineError, ParamsError, StoreError, ToolError
from pipelines.evaluate_records import EvaluateRecord

if TYPE_CHECKING:
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.stores.base import Store
    from pipelines.toolchain import Toolchain

OURS: Final = "this checkout"
_ANY_CODE: Final = range(256)
_SHOWN_REV: Final = 60
_TREE: Final = "fleet-compare-"
_QUANT_TYPES: Final[tuple[str, ...]] = get_args(params.QuantType)
_R = TypeVar("_R", bound=records.Record)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """
    A file that is needed, by what is known of it.

    Attributes:
        sha256: What it has to be.
        size_bytes: Its size.
        md5: Its name in DVC's cache; None if nobody knows.
        what: What it is, for people.
    """

    sha256: str
    size_bytes: int
    md5: str | None
    what: str


@dataclass(frozen=True, kw_only=True)
class Contender:
    """
    One of the two sides.

    Attributes:
        side: As the record names it.
        tools: Its llama.cpp.
        gguf: Its file.
        f16: The file that it was made from.
        evals: Record of the tasks that it did; None if there is none.
        commit: Commit that it can be made again from; None of this checkout and of a release.
    """

    side: Side
    tools: Toolchain
    gguf: Wanted
    f16: Wanted | None
    evals: EvaluateRecord | None
    commit: str | None


class NothingToCompareError(ParamsError):
    """One of the two sides does not exist, and never did: a new model, or no quant that passed."""


# --- the challenger ---------------------------------------------------------------------------


def challenger(
    declared: Declaration, at: Layout, model: str, quant: str | None, *, host: str | None = None
) -> Contender:
    """
    Return what this checkout chose, or the quant that is named.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Key of the model.
        quant: A type; None for what is chosen.
        host: For which it is chosen; None for the first one.

    Raises:
        NothingToCompareError: Nothing is chosen.
        ParamsError: The quant is not declared.
        RecordError: A record is missing.
    """
    types = set(params.quants_of(declared, model).values())
    if quant is None:
        choice = records.read(at.model_record("choose", model), records.ChoiceRecord)
        own = _of_host(choice, host)
        quant = own.winner if own else None
        if quant is None:
            why = wording.sentence(console.clean(own.sentence)) if own else ""
            raise NothingToCompareError(
                f"no quant of {model} is chosen in this checkout, so there is no challenger. {why}",
                hint=f"Name one: fleet compare {model} --quant TYPE. "
                f"Declared: {', '.join(sorted(types))}.",
            )
    if quant not in types:
        raise ParamsError(
            f"{wording.quoted(quant)} of {model} is not declared"
            f"{wording.did_you_mean(quant, types) or '.'}",
            hint=f"Declared: {', '.join(sorted(types))}.",
        )
    quantized = records.read(at.quant_record("quantize", model, quant), records.QuantizeRecord)
    converted = records.read(at.model_record("convert", model), records.ConvertRecord)
    _require_one_story(OURS, model, quant, quantized, converted)
    evals = records.read_or_reason(at.model_record("evaluate", model), EvaluateRecord)
    tools = toolchain.ensure(toolchain.spec_of(declared))
    return Contender(
        side=_side(OURS, quantized, tools),
        tools=tools,
        gguf=_wanted(quantized.gguf, f"the challenger's {quantized.gguf.name}"),
        f16=_wanted(converted.gguf, "the challenger's f16"),
        evals=None if isinstance(evals, str) else evals,
        commit=None,
    )


def _require_one_story(
    source: str,
    model: str,
    type_: str,
    quantized: records.QuantizeRecord,
    converted: records.ConvertRecord,
) -> None:
    """
    See that the records of a side speak of one model, one quant and one f16.

    Raises:
        ParamsError: They do not, or the quant is none: they were edited, or are of two runs.
    """
    told = (quantized.model, quantized.key, quantized.type, converted.model)
    fits = told == (model, f"{model}-{type_}", type_, model) and type_ in _QUANT_TYPES
    if not fits or quantized.f16_sha256 != converted.gguf.sha256:
        raise ParamsError(
            f"the records of {source} for {wording.quoted(f'{model}-{type_}')} do not speak of one "
            "quant of one f16: nothing was compared.",
            hint="Run `fleet repro` there, and commit what it writes.",
        )


def chosen(choice: records.ChoiceRecord, host: str | None = None) -> str | None:
    """Return the type that was chosen for a host, the first if None; if none was, that before."""
    own = _of_host(choice, host)
    return (own.winner or own.incumbent) if own else None


def _of_host(choice: records.ChoiceRecord, host: str | None) -> records.HostChoice | None:
    """Return the choice for a host; that for the first one if it is None, or was not declared."""
    named = (one for one in choice.hosts if one.host == host)
    return next(named, choice.hosts[0] if choice.hosts else None)


def _side(source: str, quantized: records.QuantizeRecord, tools: Toolchain) -> Side:
    return Side(
        source=source[:12] if re.fullmatch(r"[0-9a-f]{40}", source) else source,
        key=quantized.key,
        type=quantized.type,
        gguf_sha256=quantized.gguf.sha256,
        f16_sha256=quantized.f16_sha256,
        size_bytes=quantized.gguf.size_bytes,
        llama_cpp_commit=tools.commit,
        toolchain_id=tools.prefix.name,
    )


def _wanted(file: records.FileDigest, what: str) -> Wanted:
    return Wanted(sha256=file.sha256, size_bytes=file.size_bytes, md5=file.md5, what=what)


# --- the champion of a commit -----------------------------------------------------------------


def of_commit(
    at: Layout, model: str, rev: str | None, like: Side, *, host: str | None = None
) -> Contender:
    """
    Return what a commit chose.

    Args:
        at: The checkout.
        model: Key of the model.
        rev: Commit as git names it; None for where this branch left the default one.
        like: The challenger; where nothing was chosen then, the quant of its type is taken.
        host: For which; None for the first one. By its own records of then, if it had some.

    Raises:
        NothingToCompareError: The commit knows no such quant.
        ParamsError: There is no such commit.
        RecordError: A record of that time cannot be read.
    """
    git = _Git(at, model, host)
    commit = git.commit(rev)
    name = console.clean(rev)[:_SHOWN_REV] if rev else "commit"
    source = f"{name} {commit[:12]}" if commit[:12] not in name else name
    source = commit[:12] if commit.startswith(name) else source
    path = at.model_record("choose", model)
    choice = git.record(commit, path, records.ChoiceRecord)
    type_ = (chosen(choice, host) if choice else None) or like.type
    quantized = git.record(
        commit, at.quant_record("quantize", model, type_), records.QuantizeRecord
    )
    converted = git.record(commit, at.model_record("convert", model), records.ConvertRecord)
    if quantized is None or converted is None:
        raise NothingToCompareError(
            f"{source} holds no record of {model}-{type_}: there is nothing to compare with.",
            hint="Name another one: --base REV, or --champion stable.",
        )
    _require_one_story(source, model, type_, quantized, converted)
    tools = toolchain.ensure(_spec(git.toolchain(commit)))
    return Contender(
        side=_side(source, quantized, tools),
        tools=tools,
        gguf=_wanted(quantized.gguf, f"the champion's {quantized.gguf.name}"),
        f16=_wanted(converted.gguf, "the champion's f16"),
        evals=git.record(commit, at.model_record("evaluate", model), EvaluateRecord),
        commit=commit,
    )


def _spec(section: params.Toolchain) -> toolchain.ToolchainSpec:
    return toolchain.ToolchainSpec(
        llama_cpp_python=section.llama_cpp_python,
        sha256=section.sha256,
        backend=section.backend,
        recipe=section.recipe,
    )


class _Git:
    """What git holds of this checkout."""

    def __init__(self, at: Layout, model: str, host: str | None = None) -> None:
        self._at = at
        self._of = at.root / "results" / model
        self._below = None if host is None else at.on_hosts(model) / host
        self._log = at.log("compare", model)

    def run(self, *argv: str, ok_codes: Any = (0,)) -> proc.Completed:  # noqa: ANN401 - codes
        return proc.run(
            ["git", *argv],
            cwd=self._at.root,
            log=self._log,
            env={"LC_ALL": "C"},
            ok_codes=ok_codes,
        )

    def commit(self, rev: str | None) -> str:
        """
        Turn a name into a commit; without one, where this branch left the default one.

        On the default branch itself that is the last commit, with which uncommitted work is
        compared.
        """
        git = trees.Git(self._at.root)
        if rev is not None:
            return git.commit(rev)
        try:
            head = git.parse("HEAD")
        except MachineError:
            head = None
        if head is None:
            raise ParamsError(
                "this is no git repository with a commit: there is no champion to read from it.",
                hint="Compare with a release: --champion stable.",
            )
        return git.fork_point(head) or head

    def show(self, commit: str, path: Path) -> str | None:
        """Return a file of a commit; None if it has none."""
        name = path.relative_to(self._at.root).as_posix()
        found = trees.Git(self._at.root).show(commit, name)
        return None if found is None else found.decode(errors="replace")

    def record(self, commit: str, path: Path, kind: type[_R]) -> _R | None:
        """Return a record of a commit; None if it has none, or one of another version."""
        text = None if self._below is None else self.show(commit, self._own(path))
        text = self.show(commit, path) if text is None else text
        try:
            return None if text is None else kind.model_validate_json(text)
        except ValidationError:
            console.warn(
                f"{path.name} of {commit[:12]} is not a {kind.__name__} of this version: left out."
            )
            return None

    def _own(self, path: Path) -> Path:
        """Return where the host has a record of its own, if it is not the first one."""
        assert self._below is not None, "there is a host"
        return self._below / path.relative_to(self._of)

    def toolchain(self, commit: str) -> params.Toolchain:
        """Return the pin of a commit; the rest of its declaration may be of another version."""
        text = self.show(commit, self._at.params)
        if text is None:
            raise ParamsError(f"{commit[:12]} has no {self._at.params.name}.", hint="--base REV")
        with tempfile.TemporaryDirectory(prefix="fleet-compare-") as directory:
            path = Path(directory) / "params.yaml"
            path.write_text(text, encoding="utf-8")
            data = marked_yaml.read(path).data
        try:
            section = data["toolchain"] if isinstance(data, dict) else None
            return params.Toolchain.model_validate(section)
        except (KeyError, ValidationError) as error:
            raise ParamsError(
                f"the `toolchain` of {commit[:12]} cannot be read by this version.",
                hint="Compare with a release: --champion stable.",
            ) from error


# --- the champion of a release ----------------------------------------------------------------


def of_release(declared: Declaration, at: Layout, model: str, wanted: str) -> Contender:
    """
    Return the stable quant of a release of the local registry.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Key of the model.
        wanted: `stable`, `previous`, or the first digits of an id.

    Raises:
        NotThereError: There is no such release.
        MachineError: No toolchain of its commit is installed here.
    """
    from pipelines import reading  # noqa: PLC0415 - stores
    from pipelines.ledger import Ledger  # noqa: PLC0415 - the same
    from pipelines.stores import open_store  # noqa: PLC0415 - the same

    store = open_store(params.LOCAL_REGISTRY, declared, at.root)
    ledger = Ledger.load(at.ledger(model), model)
    id_, release, _ = reading.resolve(store, model, wanted, ledger)
    quant = next((one for one in release.quants if one.type == release.stable_quant), None)
    if quant is None:
        raise StoreError(f"release {release_records.short(id_)} names no quant of its own.")
    size_bytes = next(file.size_bytes for file in release.of("gguf", quant.type))
    tools = _tools_of(declared, release.tools.llama_cpp_commit)
    source = f"release {release_records.short(id_)}"
    side = Side(
        source=source,
        key=quant.key,
        type=quant.type,
        gguf_sha256=quant.gguf_sha256,
        f16_sha256=quant.f16_sha256,
        size_bytes=size_bytes,
        llama_cpp_commit=tools.commit,
        toolchain_id=tools.prefix.name,
    )
    evals = records.read_or_reason(at.model_record("evaluate", model), EvaluateRecord)
    return Contender(
        side=side,
        tools=tools,
        gguf=Wanted(
            sha256=quant.gguf_sha256, size_bytes=size_bytes, md5=None, what=f"the GGUF of {source}"
        ),
        f16=None,
        evals=None if isinstance(evals, str) else evals,
        commit=None,
    )


def _tools_of(declared: Declaration, commit: str) -> Toolchain:
    """Return an installed toolchain of a llama.cpp commit: ours, or one that was ours before."""
    ours = toolchain.ensure(toolchain.spec_of(declared))
    if ours.commit == commit:
        return ours
    for prefix in sorted(ours.prefix.parent.iterdir()):
        found = toolchain.open_prefix(prefix) if prefix.is_dir() else None
        if found is not None and (found.commit, found.backend) == (commit, ours.backend):
            return found
    raise MachineError(
        f"the release was made and measured with llama.cpp {commit[:12]}, which is not installed "
        f"here; ours is {ours.commit[:12]}.",
        hint="Name the commit that pinned it: --base REV. Its toolchain is then built.",
    )


# --- the bytes --------------------------------------------------------------------------------


def bring(declared: Declaration, at: Layout, model: str, of: Contender, wanted: Wanted) -> Path:
    """
    Return a file with the wanted bytes, below the checkout.

    Looked for in work/, in DVC's cache, in the local registry; else made again from the commit.

    Raises:
        DigestError: What was made again has other bytes.
        FleetError: It is nowhere, and nothing says how to make it.
    """
    target = at.scratch(model) / f"compare-{wanted.sha256[:16]}.gguf"
    here = [*sorted((at.root / "work" / model / "gguf").glob("*.gguf")), at.f16(model), target]
    for path in here:
        if _is(path, wanted):
            return path
    if _link(_cached(at, wanted), target, wanted) or _from_registry(
        declared, at, model, wanted, target
    ):
        return target
    made = _make_again(at, model, of)
    if _link(_cached(at, wanted), target, wanted) or _link(made, target, wanted):
        return target
    for path in here:
        if _is(path, wanted):
            return path
    raise ToolError(
        f"{wanted.what} with sha256 {wanted.sha256[:12]} is neither here, nor in DVC's cache or "
        "the local registry, and making it again gave other bytes.",
        hint="Bring it: dvc pull. Or compare with a release: --champion stable.",
        log=at.log("compare", model),
    )


def _is(path: Path, wanted: Wanted) -> bool:
    try:
        return (
            path.stat().st_size == wanted.size_bytes
            and hashing.digest(path).sha256 == wanted.sha256
        )
    except OSError:
        return False


def _link(source: Path | None, target: Path, wanted: Wanted) -> bool:
    """Give a file with the wanted bytes its name here: a link where the disk can, else a copy."""
    if source is None or not _is(source, wanted):
        return False
    with atomic.replacing(target) as part:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
    return True


def _cached(at: Layout, wanted: Wanted) -> Path | None:
    """Return where DVC would keep a file."""
    if wanted.md5 is None:
        return None
    return dvc_state.cache_dir(at.root) / "files/md5" / wanted.md5[:2] / wanted.md5[2:]


def _from_registry(
    declared: Declaration, at: Layout, model: str, wanted: Wanted, target: Path
) -> bool:
    from pipelines import reading  # noqa: PLC0415 - stores
    from pipelines.stores import open_store  # noqa: PLC0415 - the same

    store: Store = open_store(params.LOCAL_REGISTRY, declared, at.root)
    with contextlib.suppress(FleetError):
        if store.blob_size(model, wanted.sha256) != wanted.size_bytes:
            return False
        file = release_records.ReleaseFile(
            name=target.name,
            role="gguf",
            type=None,
            media_type="",
            size_bytes=wanted.size_bytes,
            sha256=wanted.sha256,
        )
        reading.read_to(store, model, file, target, lambda _: None)
        return True
    return False


def _make_again(at: Layout, model: str, of: Contender) -> Path | None:
    """
    Make a GGUF again by DVC: of a commit in a temporary worktree of it, of ours right here.

    The worktree shares this checkout's cache, so that only what is missing is made, and what was
    made stays in the cache under its md5. What a remote has is brought first.
    """
    key = of.side.key
    if of.commit is None:
        if of.side.source != OURS:
            return None
        console.step(f"{key} is not here: it is brought or made")
        _dvc(at.root, at, model, key, dvc_state.cache_dir(at.root))
        return at.gguf(model, key)
    console.step(f"{key} of {of.commit[:12]} is not here: it is brought or made again")
    git = _Git(at, model)
    _sweep(git, _scratch(at, model))
    with tempfile.TemporaryDirectory(prefix=_TREE, dir=_scratch(at, model)) as directory:
        tree = Path(directory) / "tree"
        # No hook of this checkout has to do with it: that of `dvc install` would check files out.
        git.run("-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", "--quiet",
                str(tree.resolve()), of.commit, ok_codes=(0,))  # fmt: skip
        try:
            cache = dvc_state.cache_dir(at.root).resolve()
            (tree / ".dvc/config.local").write_text(f"[cache]\n    dir = {cache}\n")
            _dvc(tree, at, model, key, cache)
            made = tree / "work" / model / "gguf" / f"{key}.gguf"
            if made.exists():
                kept = at.scratch(model) / f"compare-made-{of.commit[:12]}.gguf"
                with atomic.replacing(kept) as part:
                    shutil.copyfile(made, part)
                return kept
        finally:
            git.run("worktree", "remove", "--force", str(tree.resolve()), ok_codes=_ANY_CODE)
            git.run("worktree", "prune", ok_codes=_ANY_CODE)
    return None


def _sweep(git: _Git, scratch: Path) -> None:
    """Remove the worktrees that a kill left behind: who holds the machine's lock owns them all."""
    for left in scratch.glob(f"{_TREE}*"):
        git.run("worktree", "remove", "--force", str((left / "tree").resolve()), ok_codes=_ANY_CODE)
        shutil.rmtree(left, ignore_errors=True)
    git.run("worktree", "prune", ok_codes=_ANY_CODE)


def _scratch(at: Layout, model: str) -> Path:
    path = at.scratch(model)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _dvc(root: Path, at: Layout, model: str, key: str, cache: Path) -> None:
    """Bring what a remote has of a quant, and make the rest; the code is that of `root`."""
    own_bin = str(Path(sys.executable).parent)
    env = {
        "PATH": os.pathsep.join([own_bin, os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(
            [str(root.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "SHELL": "/bin/sh",
        "DVC_NO_ANALYTICS": "1",
        "GITHUB_ACTIONS": "",
    }
    cache.mkdir(parents=True, exist_ok=True)
    for argv in (["pull", f"quantize@{key}"], ["repro", f"quantize@{key}"]):
        with console.Progress(f"dvc {argv[0]} quantize@{key}"):
            proc.run(
                [sys.executable, "-m", "dvc", *argv],
                cwd=root,
                log=at.log("compare", model),
                env=env,
                # What no remote has is made; the bytes decide in the end.
                ok_codes=_ANY_CODE if argv[0] == "pull" else (0,),
            )
