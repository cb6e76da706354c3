"""
What a fork has beside params.yaml: code owners, the DVC remote, and what is left of the example.

Each function returns files as they will be, `{path: bytes}`, with None for those that go. Nothing
is written here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from pipelines import doctor_lines, gpu, init_text, machine, wording
from pipelines.errors import ParamsError
from pipelines.init_state import PLACEHOLDER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from pipelines.layout import Layout

CODEOWNERS: Final = ".github/CODEOWNERS"
DVC_CONFIG: Final = ".dvc/config"
LOCK: Final = "dvc.lock"
MIB: Final = 1 << 20
# A user, or a team of an organisation (GitHub: "About code owners"); no address of mail.
_OWNER: Final = re.compile(r"@[A-Za-z0-9](?:[A-Za-z0-9-]{0,38})(?:/[A-Za-z0-9._-]{1,100})?")
_NOBODY: Final = re.compile(rf"{PLACEHOLDER}\S+")
# What stays of main memory for everything but models.
_SYSTEM_SHARE: Final = 0.25
_FOLDER: Final = re.compile(r"[A-Za-z0-9._/](?:[A-Za-z0-9._/ -]{0,398}[A-Za-z0-9._/-])?")
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+]*)://")
# Kinds of remotes, by the package of requirements.lock that brings them.
_PACKAGES: Final = {"s3": "dvc_s3", "http": "dvc_http", "https": "dvc_http"}


# --- who owns it ------------------------------------------------------------------------------


def owners_of(at: Layout) -> tuple[str, ...]:
    """Return the owner of the repository on GitHub, by its remote `origin`; nobody if unknown."""
    slug = doctor_lines.github_repository(at.root)
    owner = f"@{slug.partition('/')[0]}" if slug else ""
    return (owner,) if _OWNER.fullmatch(owner) else ()


def codeowners(at: Layout, owners: tuple[str, ...]) -> tuple[dict[str, bytes | None], str]:
    """
    Write who has to agree to a change, in place of the template's nobody.

    Args:
        at: The checkout.
        owners: `@login` or `@organisation/team`; an `@` may be missing.

    Returns:
        The file, if it changes; and a sentence if owners were named that nothing is done with.

    Raises:
        ParamsError: One of them is no name on GitHub.
    """
    named = [owner if owner.startswith("@") else f"@{owner}" for owner in owners]
    for owner in named:
        if not _OWNER.fullmatch(owner):
            raise ParamsError(
                f"--owner {wording.quoted(owner)} is no account on GitHub.",
                hint="--owner @login, or --owner @organisation/team",
            )
    path = at.root / CODEOWNERS
    if not named or not path.is_file():
        return {}, ""
    before = path.read_bytes()
    text = before.decode(errors="surrogateescape")
    after = "".join(_owned(line, " ".join(named)) for line in text.splitlines(keepends=True))
    found = after.encode(errors="surrogateescape")
    missing = [owner for owner in named if owner not in after.split()]
    if missing:
        named_there = f"{wording.listed(missing)} {'is' if len(missing) == 1 else 'are'} not in it"
        return {}, f"{CODEOWNERS} has owners already and stays as it is: {named_there}."
    return ({CODEOWNERS: found} if found != before else {}), ""


def needs_owner(at: Layout) -> bool:
    """Tell whether CODEOWNERS still names nobody."""
    path = at.root / CODEOWNERS
    return path.is_file() and PLACEHOLDER.encode() in path.read_bytes()


def _owned(line: str, owners: str) -> str:
    if line.startswith("#"):
        return line
    first = _NOBODY.sub(owners, line, count=1)
    # Two nobodies on one line are one somebody.
    return re.sub(rf"[ \t]+{PLACEHOLDER}\S+", "", first)


# --- where large files go ---------------------------------------------------------------------


def dvc_config(at: Layout, remote: str | None) -> dict[str, bytes | None]:
    """
    Let DVC's default remote be another one.

    Args:
        at: The checkout.
        remote: A folder, from the root of the repository, or an address such as s3://bucket/dvc.

    Raises:
        ParamsError: It holds a password, is of a kind that cannot be had, or the file has no
            default remote whose line could be exchanged.
    """
    if remote is None:
        return {}
    url = _remote_url(at, remote)
    path = at.root / DVC_CONFIG
    if not path.is_file():
        raise ParamsError(f"{DVC_CONFIG} is missing.", hint=f"git checkout HEAD -- {DVC_CONFIG}")
    before = path.read_text(encoding="utf-8")
    name = _default_remote(before)
    head = re.compile(rf"""^\['?remote "{re.escape(name)}"'?\]\s*$""", re.MULTILINE)
    found = head.search(before)
    rest = before[found.end() :] if found else ""
    section = rest[: end.start()] if (end := re.search(r"^\[", rest, re.MULTILINE)) else rest
    line = re.search(r"^(\s*url\s*=\s*)(.*?)[ \t]*$", section, re.MULTILINE)
    if found is None or line is None:
        raise ParamsError(
            f"{DVC_CONFIG} has no default remote with a line `url = ...`.",
            hint=f"dvc remote add --force --default storage {url}",
        )
    start = found.end() + line.start(2)
    after = before[:start] + url + before[start + len(line[2]) :]
    return {DVC_CONFIG: after.encode()} if after != before else {}


def _default_remote(config: str) -> str:
    found = re.search(r"^\s*remote\s*=\s*(\S+)\s*$", config, re.MULTILINE)
    return found[1].strip("\"'") if found else "local"


def _remote_url(at: Layout, remote: str) -> str:
    scheme = _SCHEME.match(remote)
    if scheme is None:
        if not _FOLDER.fullmatch(remote):
            raise ParamsError(
                f"--remote {wording.quoted(remote)} is no name of a folder that goes into a file "
                "of settings.",
                hint="Letters, digits, `.`, `_`, `-`, `/` and blanks within.",
            )
        folder = Path(remote)
        # DVC reads a relative path from the folder of its config file.
        if folder.is_absolute():
            return folder.as_posix()
        return Path(os.path.relpath(at.root / folder, at.root / ".dvc")).as_posix()
    try:
        parts = urlsplit(remote)
        has_login = parts.username is not None or parts.password is not None
    except ValueError:
        has_login = False
    if has_login or not re.fullmatch(r"[!-~]{1,400}", remote):
        raise ParamsError(
            "--remote holds a user, a password or odd characters: the file is in git.",
            hint="Credentials come from the environment (AWS_* for s3://) or .dvc/config.local.",
        )
    package = _PACKAGES.get(scheme[1])
    if package is None or importlib.util.find_spec(package) is None:
        kinds = ", ".join(f"{each}://" for each in _PACKAGES)
        raise ParamsError(
            f"--remote {scheme[1]}://: this installation of DVC has no such remotes.",
            hint=f"A folder, or one of {kinds}; for others install dvc-{scheme[1]} and write "
            f"{DVC_CONFIG} yourself.",
        )
    return remote


# --- this machine -----------------------------------------------------------------------------


def machine_name() -> str:
    """Return this machine's name as a key of hosts:; `local` where none can be made of it."""
    short = platform.node().partition(".")[0].lower()
    return init_text.key_of(short) if re.search("[a-z]", short) else "local"


def memory() -> tuple[str, int, str]:
    """Return what this machine has for models: the key of params.yaml, MiB, and of what."""
    cards = gpu.cards()
    if cards:
        names = wording.listed([card.name for card in cards])
        return "vram_mib", sum(card.vram_mib for card in cards), names
    usable = machine.usable_memory_bytes() / MIB
    mib = int(usable * (1 - _SYSTEM_SHARE)) // 256 * 256
    of_what = f"three quarters of its {wording.mib(usable)} of main memory"
    return "memory_mib", max(mib, 256), of_what


# --- the example ------------------------------------------------------------------------------


def example_records(at: Layout, names: Collection[str]) -> dict[str, bytes | None]:
    """
    Name what was recorded of the example: its folders in results/, the report, the lock.

    Only for a fleet that declares nothing else: every entry of dvc.lock is the example's then.
    """
    gone = sorted(_files(at, names))
    return {path.relative_to(at.root).as_posix(): None for path in gone}


def _files(at: Layout, names: Collection[str]) -> Iterator[Path]:
    for name in names:
        folder = at.root / "results" / name
        if not folder.is_symlink():
            yield from (path for path in folder.rglob("*") if path.is_symlink() or path.is_file())
    for path in (at.root / LOCK, at.report_markdown, at.report_html):
        if path.is_file():
            yield path
