"""
What `fleet doctor` says of the files that dvc.lock names: are they here, are they in the remote.

A dvc.lock whose objects were never pushed is green for who wrote it, and "missing cache files" for
everybody else. Objects are looked for by name and size; their bytes are hashed where a stage or a
registry takes them (docs/fetch.md, docs/registry.md).
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipelines import doctor_lines, dvc_state, wording
from pipelines.doctor_lines import ANSWER_WITHIN_S, Line, fail, ok, warn
from pipelines.errors import DigestError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pipelines.layout import Layout

# Where DVC 3 keeps an object, below its cache and below a remote (dvc/cachemgr.py).
_OBJECTS: Final = "files/md5"
_OID: Final = re.compile(r"[0-9a-f]{32}(?:\.dir)?")
_KEY: Final = re.compile(r"\\\$\\\{[^}]+\\\}")
_LARGEST_LISTING_BYTES: Final = 16 << 20
_MOST_NAMED: Final = 5
_AGAIN: Final = "fleet repro    # makes them again from the pinned sources"


@dataclass(frozen=True)
class Wanted:
    """
    An object that dvc.lock names, directly or in a folder.

    Attributes:
        oid: Its md5, with `.dir` for the list of a folder.
        path: Of the output that it is, or is part of.
        size_bytes: None of a list, and of what is in a folder.
    """

    oid: str
    path: str
    size_bytes: int | None

    def below(self, store: Path) -> Path:
        """Return where it lies in a store of DVC's."""
        return store / _OBJECTS / self.oid[:2] / self.oid[2:]


def lines(
    at: Layout, stages: Mapping[str, Any], graph: Mapping[str, Any], *, offline: bool
) -> list[Line]:
    """
    Look for every object, and at the remote.

    Args:
        at: The checkout.
        stages: Of dvc.lock, by name; those of models that are not declared left out.
        graph: What dvc.yaml says.
        offline: Ask no server.
    """
    wanted = _wanted(stages, graph)
    cache = dvc_state.cache_dir(at.root)
    listed = [*wanted, *_members(wanted, cache)]
    absent, short = [], []
    for each in listed:
        size = _size(each.below(cache))
        if size is None:
            absent.append(each)
        elif each.size_bytes is not None and size != each.size_bytes:
            short.append(each)
    found = list(_short(short, cache))
    place = dvc_state.remote(at.root)
    if place is None:
        return [*found, *_objects(listed, absent, {}, at), _no_remote(at)]
    name, url = place
    if "://" not in url:
        return [*found, *_in_folder(name, Path(url), listed, absent, at)]
    if offline:
        told = ok("repository", "remote", f"{name} is {_shown(url)}; not asked: --offline")
        return [*found, *_objects(listed, absent, None, at), told]
    return [*found, *_served(name, url, listed, absent, at)]


# --- what dvc.lock names ----------------------------------------------------------------------


def _wanted(stages: Mapping[str, Any], graph: Mapping[str, Any]) -> list[Wanted]:
    """Return the outputs that DVC keeps; one that is in git has `cache: false` in dvc.yaml."""
    in_git = _uncached(graph)
    found: dict[str, Wanted] = {}
    for entry in stages.values():
        outs = entry.get("outs") if isinstance(entry, dict) else None
        for out in outs if isinstance(outs, list) else ():
            if not isinstance(out, dict):
                continue  # DVC itself says that this is no output.
            oid, path = str(out.get("md5", "")), str(out.get("path", ""))
            if _OID.fullmatch(oid) and not any(each.fullmatch(path) for each in in_git):
                size = out.get("size")
                is_file = isinstance(size, int) and not oid.endswith(".dir")
                found.setdefault(oid, Wanted(oid, path, size if is_file else None))
    return list(found.values())


def _uncached(graph: Mapping[str, Any]) -> list[re.Pattern[str]]:
    """Return the paths that dvc.yaml keeps out of the cache; `${key}` is any word."""
    found = []
    stages = graph.get("stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        body = stage.get("do", stage) if isinstance(stage, dict) else {}
        for kind in ("outs", "metrics", "plots"):
            for out in body.get(kind) or ():
                if isinstance(out, dict):
                    ((path, options),) = out.items()
                    if isinstance(options, dict) and options.get("cache") is False:
                        found.append(re.compile(_KEY.sub("[^/]+", re.escape(str(path)))))
    return found


def _members(wanted: Iterable[Wanted], cache: Path) -> Iterator[Wanted]:
    """Yield what is in the folders whose lists are here."""
    for folder in wanted:
        listing = folder.below(cache)
        size = _size(listing) if folder.oid.endswith(".dir") else None
        if size is None or size > _LARGEST_LISTING_BYTES:
            continue
        try:
            entries = json.loads(listing.read_bytes())
            members = {str(each["md5"]): str(each["relpath"]) for each in entries}
        except (OSError, ValueError, TypeError, KeyError):
            continue  # DVC itself says that the list is none.
        for oid, name in members.items():
            if _OID.fullmatch(oid):
                yield Wanted(oid, f"{folder.path}/{name}", None)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


# --- what is said of them ---------------------------------------------------------------------


def _short(short: list[Wanted], cache: Path) -> Iterator[Line]:
    """Say which objects have another size than dvc.lock: DVC itself would hand them out."""
    if short:
        paths = wording.first_few([each.path for each in short])
        files = " ".join(f"'{each.below(cache)}'" for each in short[:3])
        yield fail(
            "repository",
            "objects",
            f"{paths} in DVC's cache has another size than dvc.lock says: it was cut or changed",
            f"rm -f {files}\n{_AGAIN}",
            code=DigestError.exit_code,
        )


def _objects(
    listed: list[Wanted],
    absent: list[Wanted],
    there: Mapping[str, str] | None,
    at: Layout,
    *,
    is_own: bool = False,
) -> Iterator[Line]:
    """
    Say what is missing.

    Args:
        listed: Everything that dvc.lock names.
        absent: What is not in the cache.
        there: Remote by each object in one; None if nobody could ask it.
        at: The checkout.
        is_own: The remote is a folder of this checkout, which no clone has ever seen anything of.
    """
    if not listed:
        return
    if not absent:
        yield ok("repository", "objects", f"all {len(listed)} of dvc.lock are in the cache")
        return
    laid = [each for each in absent if _is_laid(each, at)]
    remote = [each for each in absent if there and each.oid in there and each not in laid]
    lost = [each for each in absent if each not in laid and each not in remote]
    of = f"of {wording.counted(len(listed), 'object')} of dvc.lock"
    if laid:
        yield warn(
            "repository",
            "objects",
            f"{len(laid)} {of} lie in work/ alone, not in the cache: {_paths(laid)}",
            # Never with --force: it takes whatever lies there for what the stage made.
            f"{_commit(laid)}    # answer n where it asks: there bytes differ\n{_AGAIN}",
        )
    if remote:
        names = wording.first_few(sorted({(there or {})[each.oid] for each in remote}))
        yield warn(
            "repository",
            "objects",
            f"{len(remote)} {of} are in the remote {names} and not here: {_paths(remote)}",
            "dvc pull --allow-missing",
        )
    if lost and there is None:
        yield warn(
            "repository",
            "objects",
            f"{len(lost)} {of} are not here, and the remote could not be asked: {_paths(lost)}",
            f"dvc pull --allow-missing\n{_AGAIN}",
        )
    elif is_own and len(lost) == len(listed):
        # A fresh clone: nothing was lost, for nothing was ever where a clone could get it.
        yield warn(
            "repository",
            "objects",
            f"none of {wording.counted(len(listed), 'object')} of dvc.lock was ever pushed to a "
            "remote that a clone could reach",
            _AGAIN,
        )
    elif lost:
        yield fail(
            "repository",
            "objects",
            f"{len(lost)} {of} are nowhere: {_paths(lost)}",
            f"{_AGAIN}\ndvc push       # instead, in a checkout that has them; then here: dvc pull",
            code=StoreError.exit_code,
        )


def _commit(laid: list[Wanted]) -> str:
    paths = sorted({each.path for each in laid})
    return " ".join(["dvc commit", *(map(shlex.quote, paths) if len(paths) <= _MOST_NAMED else ())])


def _is_laid(each: Wanted, at: Layout) -> bool:
    path = at.root / each.path
    if each.oid.endswith(".dir"):
        return path.is_dir()
    size = _size(path)
    return size is not None and (each.size_bytes is None or size == each.size_bytes)


def _paths(wanted: list[Wanted]) -> str:
    return wording.first_few(sorted({each.path for each in wanted}))


# --- the remote -------------------------------------------------------------------------------


def _no_remote(at: Layout) -> Line:
    where = "" if (at.root / ".dvc").is_dir() else ": there is no .dvc here"
    return warn(
        "repository",
        "remote",
        f"none is configured{where}; another machine cannot get what was made here",
        "dvc remote add --default store s3://BUCKET/PATH    # or a folder: /srv/dvc",
    )


def _in_folder(
    name: str, folder: Path, listed: list[Wanted], absent: list[Wanted], at: Layout
) -> Iterator[Line]:
    """Look into a remote that is a folder; on a disk of the network nobody may ever answer."""
    seen: set[str] | None = None
    told: list[Line] = []

    def look() -> Iterator[Line]:
        nonlocal seen
        there = {each.oid for each in listed if _size(each.below(folder)) is not None}
        told.extend(_folder(name, folder, listed, there, at))
        seen = there
        yield from ()

    broken = doctor_lines.together("repository", {"remote": look}, within_s=ANSWER_WITHIN_S)
    if seen is None:
        yield from _objects(listed, absent, None, at)
        text = f"{name} is {folder}: {broken[0].text}"
        fix = f"ls '{folder}'    # hangs, too, where a disk of the network is gone: mount it again"
        yield warn("repository", "remote", text, fix)
        return
    own = _is_inside(folder, at)
    yield from _objects(listed, absent, dict.fromkeys(seen, name), at, is_own=own)
    yield from told


def _is_inside(folder: Path, at: Layout) -> bool:
    return folder.resolve().is_relative_to(at.root.resolve())


def _folder(
    name: str, folder: Path, listed: list[Wanted], there: set[str], at: Layout
) -> Iterator[Line]:
    """Say of a remote that is a folder whether it is there, and who can reach it."""
    inside = _is_inside(folder, at)
    missing = [each for each in listed if each.oid not in there]
    held = _count(listed, len(listed) - len(missing))
    if inside and doctor_lines.github_repository(at.root):
        yield warn(
            "repository",
            "remote",
            f"{name} is a folder of this checkout, {folder}: no runner can get anything from it",
            f"dvc remote modify {name} url /srv/dvc    # or s3://BUCKET/PATH\ndvc push",
        )
    elif not inside and not folder.exists():
        yield fail(
            "repository",
            "remote",
            f"{name} is {folder}, which is not there: not mounted?",
            f"mkdir -p '{folder}'    # or mount it",
            code=StoreError.exit_code,
        )
    elif not inside and missing:
        yield warn("repository", "remote", f"{name} is {folder}; {held}", "dvc push")
    else:
        yield ok("repository", "remote", f"{name} is {folder}; {held}")


def _served(
    name: str, url: str, listed: list[Wanted], absent: list[Wanted], at: Layout
) -> Iterator[Line]:
    """Ask a remote on a server, through DVC, which of the objects it has."""
    from dvc.repo import Repo  # noqa: PLC0415 - 0.5 s, and only for a server

    there: set[str] | None = None

    def ask() -> Iterator[Line]:
        nonlocal there
        if not listed:
            store.fs.exists(store.path)  # so that somebody answers
        there = set(store.oids_exist([each.oid for each in listed]))
        missing = [each for each in listed if each.oid not in there]
        held = f"{_held(name, url)}; {_count(listed, len(listed) - len(missing))}"
        yield (
            warn("repository", "remote", held, "dvc push")
            if missing
            else ok("repository", "remote", held)
        )

    repo = Repo(str(at.root))
    try:
        # Its client is imported before somebody waits for the server.
        store = repo.cloud.get_remote_odb(name)
        told = doctor_lines.together("repository", {"remote": lambda: _refused(name, url, ask)})
    except Exception as error:  # noqa: BLE001 - a scheme that this DVC has no client of, say
        told = [_unread(name, url, error)]
    finally:
        repo.close()
    yield from _objects(listed, absent, None if there is None else dict.fromkeys(there, name), at)
    yield from told


def _refused(name: str, url: str, ask: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Ask, and say as a failure of the store whatever its client raises."""
    try:
        yield from list(ask())
    except Exception as error:  # noqa: BLE001 - each client has its own
        yield _unread(name, url, error)


def _unread(name: str, url: str, error: Exception) -> Line:
    cause = str(error.__cause__ or error) or type(error).__name__
    return fail(
        "repository",
        "remote",
        f"{_held(name, url)}; it cannot be read: {wording.shortened(cause, 200)}",
        "dvc config --list --show-origin    # address, region, endpoint; then the login",
        code=StoreError.exit_code,
    )


def _count(listed: list[Wanted], there: int) -> str:
    return f"{there} of {len(listed)} objects are in it" if listed else "nothing was made yet"


def _held(name: str, url: str) -> str:
    return f"{name} is {_shown(url)}"


def _shown(url: str) -> str:
    """Return an address without a login in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
