"""
What DVC need not find out again: the md5 of a file that we have just hashed.

DVC names what it caches by md5 and keeps, for each path, the md5 that it computed for one inode,
modification time and size. A stage that has hashed its output while writing it enters that line
itself, through DVC's own code, and DVC then moves the file into its cache without reading it: for
a 16 GB model that is one pass, about 25 s on one core, for each stage that would have read it.

`Repo.state` is internal to DVC, so it is used only on the major versions that the tests run with,
and whatever goes wrong has one meaning: DVC hashes the file. A wrong line cannot arise from here as
long as callers pass only the md5 of bytes that they have just written: a later change of the file
changes its time stamp, which voids the line.
"""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipelines import atomic

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

# Importing DVC and opening the repository takes 0.4 s; hashing 256 MiB takes 0.3 to 0.5 s.
WORTH_BYTES: Final = 256 << 20
TESTED_MAJORS: Final = {"dvc": "3", "dvc-data": "3"}


def remember(path: Path, md5: str) -> bool:
    """
    Tell DVC the md5 of one file; see `remember_all`.

    Returns:
        Whether DVC knows it now; if not, DVC will hash the file itself.
    """
    return remember_all({path: md5})


def remember_all(md5s: Mapping[Path, str]) -> bool:
    """
    Tell DVC the md5 of files that were just written and hashed under their final names.

    Files too small to be worth it are left to DVC. Never raises: without the hint DVC is slower,
    not wrong.

    Args:
        md5s: {file: md5 of its bytes as they are on the disk now}.

    Returns:
        Whether DVC knows all of them that are worth it; False if there was none.
    """
    worthy = {
        Path(os.path.abspath(path)): md5  # noqa: PTH100 - resolve() would follow DVC's own links
        for path, md5 in md5s.items()
        if path.stat().st_size >= WORTH_BYTES
    }
    if not worthy:
        return False
    root = _dvc_root(next(iter(worthy)))
    if root is None or not _is_tested_version():
        return False
    try:
        _save(root, worthy)
    except Exception:  # noqa: BLE001 - whatever an internal interface raises means "DVC hashes"
        return False
    return True


def cache_dir(root: Path) -> Path:
    """
    Return where DVC caches the artifacts of the checkout `root`, as its config files say.

    Those of the checkout come before the user's and the machine's, in which a runner says where
    the cache is that its jobs share (dvc/config.py, `LEVELS`).
    """
    declared = _declared(root, "cache", "dir")
    # DVC reads a relative path from the directory of the config file.
    return root / ".dvc/cache" if declared is None else declared[1] / declared[0]


def remote(root: Path) -> tuple[str, str] | None:
    """
    Return name and address of the default remote of the checkout `root`.

    Returns:
        A folder as its path, absolute or from the working directory; None if none is configured.
    """
    name = _declared(root, "core", "remote")
    found = name and _declared(root, f"'remote \"{name[0]}\"'", "url")
    if not name or not found:
        return None
    url, folder = found
    return name[0], url if "://" in url else str(folder / url)


def _declared(root: Path, section: str, option: str) -> tuple[str, Path] | None:
    """Return what DVC's config files say of an option, and the folder of the one that says it."""
    directory = root / ".dvc"
    checkout = (directory / "config.local", directory / "config")
    for path in (*checkout, *_outer_configs()):
        config = configparser.ConfigParser(interpolation=None, strict=False)
        try:
            config.read(path, encoding="utf-8")
            declared = config.get(section, option, fallback="").strip("\"'")
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue  # DVC itself will say what is wrong with it.
        if declared:
            return declared, path.parent
    return None


def _outer_configs() -> Iterator[Path]:
    """Yield DVC's configuration of the user, then that of the machine (dvc/dirs.py)."""
    import platformdirs  # noqa: PLC0415 - only after the files of the checkout

    for variable, usual in (
        ("DVC_GLOBAL_CONFIG_DIR", platformdirs.user_config_dir),
        ("DVC_SYSTEM_CONFIG_DIR", platformdirs.site_config_dir),
    ):
        yield Path(os.environ.get(variable) or usual("dvc", "iterative")) / "config"


def _save(root: Path, md5s: Mapping[Path, str]) -> None:
    """Enter the lines through DVC's own code: it knows where its database is, and its format."""
    from dvc.fs import localfs  # noqa: PLC0415 - 0.4 s, and only for large files
    from dvc.repo import Repo  # noqa: PLC0415 - the same
    from dvc_data.hashfile.hash_info import HashInfo  # noqa: PLC0415 - the same

    repo = Repo(str(root))
    try:
        repo.state.save_many(
            [(str(path), HashInfo("md5", md5), None) for path, md5 in md5s.items()], localfs
        )
    finally:
        repo.close()


def locked_stages(lock: Path) -> tuple[str, ...]:
    """Return the names of the stages in a dvc.lock; none of one that cannot be read."""
    import yaml  # noqa: PLC0415 - not at CLI start

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        stages = yaml.load(lock.read_bytes(), loader)["stages"]  # noqa: S506 - safe
        return tuple(map(str, stages))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return ()


def forget(lock: Path, names: Collection[str]) -> bool:
    """
    Take stages that dvc.yaml no longer has out of dvc.lock.

    `dvc remove` refuses a stage that is not in dvc.yaml, and DVC's own
    `Lockfile.remove_stage` reads and writes the whole file for each of them, so this does the same
    in one pass: under DVC's lock, with its own reader and writer, so that no other byte changes.
    Never raises: an entry too many costs nothing but a line in a review.

    Args:
        lock: The dvc.lock, beside DVC's folder.
        names: Stages, as dvc.lock spells them.

    Returns:
        Whether they are out of it.
    """
    if not _is_tested_version():
        return False
    try:
        from dvc.repo import Repo  # noqa: PLC0415 - 0.4 s, and only if something has to go
        from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update  # noqa: PLC0415 - same

        repo = Repo(str(lock.parent))
        try:
            with repo.lock:
                content = parse_yaml_for_update(lock.read_text(encoding="utf-8"), str(lock))
                for name in names:
                    content["stages"].pop(name, None)
                if content["stages"]:
                    atomic.write_text(lock, dumps_yaml(content))
                else:
                    lock.unlink()
        finally:
            repo.close()
    except Exception:  # noqa: BLE001 - whatever an internal interface raises: the entries stay
        return False
    return True


def _is_tested_version() -> bool:
    from importlib import metadata  # noqa: PLC0415 - 60 ms

    try:
        return all(
            metadata.version(name).split(".")[0] == major for name, major in TESTED_MAJORS.items()
        )
    except metadata.PackageNotFoundError:
        return False


def _dvc_root(path: Path) -> Path | None:
    """Return the nearest directory above with DVC's folder in it, as DVC finds its root."""
    return next((parent for parent in path.parents if (parent / ".dvc").is_dir()), None)
