"""
`fleet verify-registry`: hash everything in a registry again, and compare it with git.

A registry is believed nothing: every file is read in full, every release is parsed and every file
that it names is looked for, every alias has to mean a whole release, and its moves have to be those
of the ledger. Nothing is changed; each finding says what to do.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from pipelines import console, wording
from pipelines.errors import DigestError, FleetError, RetryLaterError, StoreError
from pipelines.params import LOCAL_REGISTRY
from pipelines.registries import history, ledgers_of, print_json, shown
from pipelines.release_records import STABLE, parse_release, release_id, short
from pipelines.stores import open_store
from pipelines.stores.base import NotThereError, hash_blob
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.layout import Layout
    from pipelines.ledger import Ledger
    from pipelines.params import Declaration
    from pipelines.release_records import Alias, Release
    from pipelines.stores.base import OnBytes, Store

Kind = Literal[
    "wrong_digest",  # a file or a release is other bytes than its name says
    "missing_file",  # a release names it, and it is not there
    "missing_release",  # an alias means it, and it is not there
    "unreadable",  # something that is none of ours, or that cannot be read
    "two_stories",  # registry and ledger tell different things of one move
    "behind",  # the ledger knows later moves: restored from a backup, replayed, or lost
    "empty",  # the same of the local registry that holds nothing of the model: a fresh clone
    "ahead",  # the registry knows moves that are not in the ledger of this checkout
    "unnamed",  # files that no release names
]
_WRONG: frozenset[Kind] = frozenset({"wrong_digest"})
# Harmless: a publisher who was killed, or one who is at work, leaves them.
_NOTES: frozenset[Kind] = frozenset({"unnamed", "ahead", "empty"})


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be; `what` is a digest, a release or an alias."""

    kind: Kind
    model: str | None
    what: str
    message: str
    next: str


@dataclass(kw_only=True)
class Verified:
    """What was read, and what was found."""

    registry: str
    address: str
    files_count: int = 0
    read_bytes: int = 0
    releases_count: int = 0
    aliases_count: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """6 for wrong bytes, 8 for whatever else is wrong, 0 if there are only notes."""
        kinds = {finding.kind for finding in self.findings} - _NOTES
        if kinds & _WRONG:
            return DigestError.exit_code
        return StoreError.exit_code if kinds else 0


def main(declared: Declaration, at: Layout, *, name: str, as_json: bool) -> int:
    """
    Verify one registry and print what was found.

    Returns:
        0, 6 if bytes are wrong, 8 if something is missing or told in two ways.

    Raises:
        ParamsError: The registry is not declared.
        RetryLaterError: It cannot be reached, or not any more; what was found until then is lost.
        LedgerError: A ledger is broken.
    """
    store = open_store(name, declared, at.root)
    ledgers = ledgers_of(declared, at)
    verified = verify(store, ledgers)
    if as_json:
        told = {**asdict(verified), "exit_code": verified.exit_code}
        print_json(told)
    else:
        _print(verified)
    return verified.exit_code


def verify(store: Store, ledgers: Mapping[str, Ledger]) -> Verified:
    """
    Read everything that a registry has.

    Args:
        store: The registry.
        ledgers: Of each model that this checkout knows.

    Raises:
        RetryLaterError: It cannot be reached.
        StoreError: It cannot be listed.
    """
    verified = Verified(registry=store.name, address=console.clean(store.shown))
    models = store.list_models()
    releases = {model: _releases(store, model, verified) for model in models}
    _files(store, releases, verified)
    for model in sorted({*models, *ledgers}):
        _aliases(store, model, ledgers.get(model), releases.get(model, {}), verified)
    return verified


def _releases(store: Store, model: str, verified: Verified) -> dict[str, Release]:
    """Read every release of a model; return those that are what they should be."""
    found: dict[str, Release] = {}
    ids = sorted(store.list_releases(model))
    label = f"reading releases of {model}"
    with console.Progress(label, total=len(ids), unit="releases") as progress:
        for done, id_ in enumerate(ids):
            progress.update(done)
            read = _release(store, model, id_)
            if isinstance(read, Finding):
                verified.findings.append(read)
            else:
                found[id_] = read
    verified.releases_count += len(ids)
    return found


def _release(store: Store, model: str, id_: str) -> Release | Finding:
    """Read one release, or say what is wrong with it."""
    remedy = (
        f"Remove that release.json from {store.name}; `fleet publish {model} --to {store.name}` "
        "brings the newest one again."
    )
    data = b""
    try:
        data = store.read_release(model, id_)
        release = parse_release(data, id_, f"registry {store.name}")
    except RetryLaterError:
        raise
    except FleetError as error:
        other = bool(data) and release_id(data) != id_
        kind: Kind = "wrong_digest" if other else "unreadable"
        return Finding(kind=kind, model=model, what=id_, message=error.message, next=remedy)
    if release.model != model:
        return Finding(
            kind="unreadable",
            model=model,
            what=id_,
            message=f"release {short(id_)} lies under {model} and is of "
            f"{console.clean(release.model)[:80]}.",
            next="Somebody copied it there: remove it.",
        )
    return release


# --- files ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Wanted:
    """A file that should be there: its size in bytes, and the releases that name it."""

    size_bytes: int
    name: str
    model: str
    by: list[str] = field(default_factory=list)


def _files(store: Store, releases: Mapping[str, Mapping[str, Release]], verified: Verified) -> None:
    """Hash every file that a release names and every other that is there."""
    wanted: dict[str, _Wanted] = {}
    for model, by_id in releases.items():
        for id_, release in by_id.items():
            for file in release.files:
                new = _Wanted(size_bytes=file.size_bytes, name=file.name, model=model)
                wanted.setdefault(file.sha256, new).by.append(shown(model, id_))
    listed = {blob.sha256: blob.size_bytes for blob in store.list_blobs()}
    sizes = {**listed, **{sha256: each.size_bytes for sha256, each in wanted.items()}}
    with Progress(f"hashing {store.name}", sum(sizes.values())) as progress:
        for sha256, size_bytes in sorted(sizes.items()):
            one = wanted.get(sha256)
            name = one.name if one else short(sha256)
            _hash(store, sha256, one, progress.of(name, size_bytes), verified)
    _note_unnamed(store, {s: size for s, size in listed.items() if s not in wanted}, verified)


def _hash(
    store: Store, sha256: str, wanted: _Wanted | None, on_bytes: OnBytes, verified: Verified
) -> None:
    """Read one file in full and compare it with its name."""
    model = wanted.model if wanted else None
    named = f" ({wanted.name}, of {wording.first_few(wanted.by)})" if wanted else ""
    remedy = (
        f"`fleet publish {model} --to {store.name}` sends it again if it is of the newest release; "
        "else copy it from another registry that has it."
    )
    try:
        found, size_bytes = hash_blob(store.read_blob(model or "", sha256), on_bytes)
    except RetryLaterError:
        raise
    except NotThereError:
        if wanted:
            text = f"file {short(sha256)}{named} is not there."
            verified.findings.append(
                Finding(kind="missing_file", model=model, what=sha256, message=text, next=remedy)
            )
        return
    except FleetError as error:
        text = f"file {short(sha256)}{named} cannot be read: {error.message}"
        verified.findings.append(
            Finding(kind="unreadable", model=model, what=sha256, message=text, next=error.hint)
        )
        return
    verified.files_count += 1
    verified.read_bytes += size_bytes
    if found != sha256 or (wanted and size_bytes != wanted.size_bytes):
        text = (
            f"file {short(sha256)}{named} is other bytes: sha256 {found}, "
            f"{wording.counted(size_bytes, 'byte')}."
        )
        remedy = f"Remove it from {store.name}: nobody may read it. Then " + remedy
        verified.findings.append(
            Finding(kind="wrong_digest", model=model, what=sha256, message=text, next=remedy)
        )


def _note_unnamed(store: Store, unnamed: Mapping[str, int], verified: Verified) -> None:
    if not unnamed:
        return
    size_mib = sum(unnamed.values()) / 2**20
    verified.findings.append(
        Finding(
            kind="unnamed",
            model=None,
            what=", ".join(sorted(unnamed)),
            message=f"{wording.counted(len(unnamed), 'file')} of {wording.number(size_mib)} MiB "
            "that no release names.",
            next=f"fleet gc --registry {store.name}",
        )
    )


# --- aliases ----------------------------------------------------------------------------------


def _aliases(
    store: Store,
    model: str,
    ledger: Ledger | None,
    releases: Mapping[str, Release],
    verified: Verified,
) -> None:
    """Compare `stable` of a model with what it means, and its moves with the ledger."""
    try:
        alias, _token = store.read_alias(model, STABLE)
    except RetryLaterError:
        raise
    except FleetError as error:
        verified.findings.append(
            Finding(
                kind="unreadable",
                model=model,
                what=f"{model}@{STABLE}",
                message=error.message,
                next=error.hint,
            )
        )
        return
    if alias is not None:
        verified.aliases_count += 1
        known = {finding.what for finding in verified.findings if finding.model == model}
        if alias.release not in releases and alias.release not in known:
            verified.findings.append(
                Finding(
                    kind="missing_release",
                    model=model,
                    what=alias.release,
                    message=f"{model}@{STABLE} means release {short(alias.release)}, which is not "
                    "there.",
                    next=f"fleet publish {model} --to {store.name}",
                )
            )
    if ledger is not None:
        verified.findings += compare(store.name, model, alias, ledger)


def compare(registry: str, model: str, alias: Alias | None, ledger: Ledger) -> Iterator[Finding]:
    """
    Yield what a registry and the ledger of this checkout tell differently of `stable`.

    Args:
        registry: Key of the registry.
        model: Key of the model.
        alias: As the registry has it.
        ledger: Of the model.
    """
    told = history(alias, ledger.moves(registry, STABLE))
    what = f"{model}@{STABLE}"
    numbers = [each.move.sequence for each in told]
    last_stored = alias.sequence if alias else 0
    for number in sorted({n for n in numbers if numbers.count(n) > 1}):
        here = [short(each.move.release) for each in told if each.move.sequence == number]
        yield Finding(
            kind="two_stories",
            model=model,
            what=what,
            message=f"move {number} of {what} is told in two ways: {wording.listed(here)} are "
            f"{'the releases' if len(set(here)) > 1 else 'told with other words'} of registry "
            f"{registry} and of the ledger.",
            next=f"fleet audit {model} shows both; keep the lines of the one that is true in "
            f"{ledger.path}.",
        )
    lost = [each for each in told if each.is_lost and numbers.count(each.move.sequence) == 1]
    if alias is None and lost and registry == LOCAL_REGISTRY:
        yield Finding(
            kind="empty",
            model=model,
            what=what,
            message=f"registry {registry} holds no {what}, as in a fresh clone; the ledger has "
            f"{wording.counted(len(lost), 'move')} of it.",
            next=f"fleet repro {model} fills it.",
        )
    elif lost:
        last = ledger.last(registry, STABLE)
        assert last is not None, "a lost move is one of the ledger"
        yield Finding(
            kind="behind",
            model=model,
            what=what,
            message=f"registry {registry} knows nothing of "
            f"{wording.counted(len(lost), 'move')} of {what} that the ledger has: it is at "
            f"{last_stored or 'none'}, the ledger at {last.sequence}. It was emptied, restored "
            "from a backup, or somebody put an old state back.",
            next=f"fleet publish {model} --to {registry} puts the moves back.",
        )
    ahead = [each for each in told if not each.in_ledger and numbers.count(each.move.sequence) == 1]
    if ahead:
        yield Finding(
            kind="ahead",
            model=model,
            what=what,
            message=f"registry {registry} has {wording.counted(len(ahead), 'move')} of {what} that "
            "the ledger of this checkout has not: made elsewhere, or the publisher was stopped "
            "before he wrote it.",
            next=f"git pull, or fleet publish {model} --to {registry}, which writes them down.",
        )


# --- for people -------------------------------------------------------------------------------


def _print(verified: Verified) -> None:
    """Say what was read, then each finding with its next step."""
    read = (
        f"{verified.registry} ({verified.address}): "
        f"{wording.counted(verified.files_count, 'file')} of "
        f"{wording.number(verified.read_bytes / 2**20)} MiB hashed, "
        f"{wording.counted(verified.releases_count, 'release')} and "
        f"{_aliases_text(verified.aliases_count)} read"
    )
    wrong = [finding for finding in verified.findings if finding.kind not in _NOTES]
    notes = [finding for finding in verified.findings if finding.kind in _NOTES]
    for finding in wrong:
        console.error(f"{finding.kind.replace('_', ' ')}: {finding.message}")
        console.info(f"  next: {finding.next}")
    for finding in notes:
        console.info(f"note: {finding.message}")
        console.info(f"  next: {finding.next}")
    state = wording.counted(len(wrong), "finding") if wrong else "all is as it should be"
    console.out(f"{read}: {state}.")


def _aliases_text(count: int) -> str:
    return "1 alias" if count == 1 else f"{count:,} aliases"
