"""
What a line less in params.yaml leaves behind, taken away before the next whole run.

DVC forgets a stage that is no longer declared, but neither its records, nor its GGUF, nor its entry
in dvc.lock: a quant that nobody wants would be reviewed, counted and kept on the disk for ever.

What was released stays on record: release.json and the ledger of a model that nobody declares any
more, and every byte in its registries.

Removed is only what `pipelines.layout` spells for a model or a quant that is not declared, and only
what is of the kind that a stage writes there: a plain file, a directory, or DVC's own link into its
cache; nothing is followed through another link. Anything else stays and is named.

What DVC has cached stays in its cache, until `dvc gc`: the line put back brings the GGUF back. A
measurement comes back from git alone, as in every other case.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, get_args

from pipelines import atomic, console, dvc_state, params, wording
from pipelines.declaration import TAKEN_NAMES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration

_MIB = 2**20
_TYPES: tuple[str, ...] = get_args(params.QuantType)
# The lists that dvc.yaml makes a stage for each entry of.
_EACH_MODEL, _EACH_QUANT = "${models}", "${quants}"


@dataclass
class _Gone:
    """A model or a quant that is not declared, and what of it was removed."""

    name: str
    paths: tuple[Path, ...]
    removed: list[Path] = field(default_factory=list)
    size_bytes: int = 0
    entries_count: int = 0

    def __str__(self) -> str:
        """Say in one line what was removed."""
        parts = [str(path) for path in self.removed]
        if self.entries_count:
            entries = "entry" if self.entries_count == 1 else "entries"
            parts.append(f"{self.entries_count} {entries} of dvc.lock")
        told = f"{self.name} is not declared any more: removed {wording.listed(parts)}"
        if self.size_bytes < _MIB:
            return f"{told}."
        size = f"{self.size_bytes / _MIB:,.1f} MiB"
        return f"{told}. DVC's cache keeps the {size} until `dvc gc --workspace`."


def retire(at: Layout, declared: Declaration, *, only: Collection[str] | None = None) -> list[str]:
    """
    Remove what models and quants left that params.yaml does not declare.

    Nothing here runs while another `fleet repro` works in the same checkout: the caller holds its
    lock.

    Args:
        at: The checkout.
        declared: Its declaration, checked.
        only: Models whose quants are looked at, and nothing else; None for everything.

    Returns:
        One line for each model or quant of which something was removed.
    """
    found = (
        (*_models(at, declared), *_quants(at, declared))
        if only is None
        else _quants(at, declared, only)
    )
    gone = {each.name: each for each in found}
    for each in gone.values():
        for path in each.paths:
            _remove(path, at, each)
    _forget(at, declared, gone, only_these=only is not None)
    for each in gone.values():
        _remove_empty(each, at, declared)
    return [str(each) for each in gone.values() if each.removed or each.entries_count]


# --- finding ----------------------------------------------------------------------------------


def _folders(at: Layout) -> Iterator[Path]:
    """Yield the folders in results/ and work/ that are, or could be, those of a model."""
    for top in (at.root / "results", at.root / "work"):
        for path in sorted(top.iterdir()) if top.is_dir() and not top.is_symlink() else ():
            named = re.fullmatch(params.MODEL_KEY, path.name) and path.name not in TAKEN_NAMES
            if named and path.is_dir() and not path.is_symlink():
                yield path


def _models(at: Layout, declared: Declaration) -> Iterator[_Gone]:
    names = {path.name for path in _folders(at)}
    for each in (at.receipt("x"), at.observed("x")):
        names |= {path.stem for path in each.parent.glob("*.json")}
    for name in sorted(names - set(declared.models)):
        if re.fullmatch(params.MODEL_KEY, name):
            yield _Gone(name, at.of_model(name))


def _quants(
    at: Layout, declared: Declaration, only: Collection[str] | None = None
) -> Iterator[_Gone]:
    """Yield every type that a model's folders could hold and that is not declared for it."""
    wanted = {(quant.model, quant.type) for quant in declared.quants.values()}
    models = {path.name for path in _folders(at)} | set(declared.models)
    for model in sorted(models if only is None else models & set(only)):
        for type_ in _TYPES:
            key = f"{model}-{type_}"
            if (model, type_) not in wanted and key not in declared.quants:
                yield _Gone(key, at.of_quant(model, key, type_))


# --- removing ---------------------------------------------------------------------------------


def _remove(path: Path, at: Layout, gone: _Gone) -> None:
    """Remove one file or directory that a stage wrote; leave, and name, anything else."""
    if not os.path.lexists(path):
        return
    why = _why_not(path, at)
    if why:
        console.warn(f"{gone.name} is not declared any more, but {path} stays: {why}.")
        return
    size_bytes = _size(path)
    atomic.remove(path)
    gone.removed.append(path)
    gone.size_bytes += size_bytes


def _why_not(path: Path, at: Layout) -> str:
    """Say why a path is not what a stage of ours wrote there; nothing if it is."""
    for parent in path.relative_to(at.root).parents:
        if (at.root / parent).is_symlink() and at.root / parent != at.root:
            return f"{at.root / parent} is a symbolic link"
    mode = path.lstat().st_mode
    # A file has an ending, a directory has none.
    is_wanted = stat.S_ISREG(mode) if path.suffix else stat.S_ISDIR(mode)
    if is_wanted or (path.suffix == ".gguf" and _is_link_of_dvc(path, at)):
        return ""
    if stat.S_ISLNK(mode):
        return "it is a symbolic link"
    return f"it is no {'file' if path.suffix else 'directory'}"


def _is_link_of_dvc(path: Path, at: Layout) -> bool:
    """Tell whether a path links into DVC's cache, as it does where it cannot be a hard link."""
    cache = dvc_state.cache_dir(at.root).resolve()
    return path.is_symlink() and cache in path.resolve().parents


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _remove_empty(gone: _Gone, at: Layout, declared: Declaration) -> None:
    """Remove the folders of a model that is gone in which nothing is left."""
    shared = {*TAKEN_NAMES, *declared.models}
    for removed in gone.removed:
        # results/MODEL or work/MODEL, and what is below it.
        for folder in [at.root / path for path in removed.relative_to(at.root).parents][:-2]:
            own = folder.relative_to(at.root).parts[1] not in shared
            if own and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


# --- dvc.lock ---------------------------------------------------------------------------------


def _forget(at: Layout, declared: Declaration, gone: dict[str, _Gone], *, only_these: bool) -> None:
    """Take entries of keys that are not declared out of dvc.lock; of all, or of `gone` alone."""
    lock = at.root / "dvc.lock"
    stages = _stages_by_list(at)
    if not lock.exists() or not stages:
        return
    names = [
        name
        for name in dvc_state.locked_stages(lock)
        if _is_gone(name, stages, declared) and (name.partition("@")[2] in gone or not only_these)
    ]
    if names and dvc_state.forget(lock, names):
        for name in names:
            key = name.partition("@")[2]
            gone.setdefault(key, _Gone(key, ())).entries_count += 1


def _stages_by_list(at: Layout) -> dict[str, str]:
    """Return the stages of dvc.yaml that are made for each model or quant, and for which."""
    import yaml  # noqa: PLC0415 - not at CLI start

    try:
        stages = yaml.safe_load((at.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
        lists = {name: stage.get("foreach") for name, stage in stages.items()}
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return {}  # DVC will say what is wrong with it.
    return {name: each for name, each in lists.items() if each in (_EACH_MODEL, _EACH_QUANT)}


def _is_gone(name: str, stages: dict[str, str], declared: Declaration) -> bool:
    stage, _, key = name.partition("@")
    known: Iterable[str] = declared.models if stages.get(stage) == _EACH_MODEL else declared.quants
    return stage in stages and key not in known
