"""
`fleet publish [MODEL] --to NAME`: the release of a model into another registry.

If results/M/release.json is the release of the records in git and a declared registry holds it
whole, exactly that one is sent, from there: a clone without work/ can publish. Else it is composed
from what the stages left, which `--pull` brings from DVC's remote. Either way the records are
judged again, today: a waiver that has ended lets nothing pass any more. A refusal is an error here,
with every reason.

Where params.yaml pins `stable` to an earlier release that the other registry does not have yet,
that one is sent first.

A run of GitHub Actions publishes what the default branch says, or nothing (`pipelines.mainline`).
What it does follows from git and from the registry alone: a run that was lost loses nothing, and a
second one changes nothing.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import (
    atomic,
    checksums,
    console,
    hashing,
    params,
    publish_hosts,
    publish_pull,
    publish_words,
    records,
    release,
    release_gates,
    runner,
    verdict_evidence,
    wording,
)
from pipelines.compare_engine_records import EngineRecord
from pipelines.compare_records import CompareRecord
from pipelines.errors import GateError, ParamsError, RetryLaterError, StoreError
from pipelines.ledger import Ledger
from pipelines.mainline import LEDGER_BRANCH, Mainline, OutdatedError
from pipelines.moves import By
from pipelines.publishing import LATEST, Outcome, publish
from pipelines.publishing_words import shown_size
from pipelines.reading import read_to
from pipelines.registries import Failures, Shelf, names, print_json, require_model
from pipelines.release import Composed, Refused
from pipelines.release_records import STABLE, parse_release, release_id, short
from pipelines.stores import oci_login, open_store
from pipelines.stores.base import Blob
from pipelines.stores.local import LocalStore
from pipelines.stores.transfer import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pipelines.layout import Layout
    from pipelines.params import Declaration, PublishSlice
    from pipelines.propose import Proposed
    from pipelines.release_gates import Judgement
    from pipelines.release_records import Release, ReleaseFile
    from pipelines.stores.base import Store

_MAX_REASON_CHARACTERS = 300
# How many files of digests publish.yml attests; each is of `checksums.MAX_SUBJECTS` lines.
_ATTESTATIONS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    How to publish.

    Attributes:
        pull: Bring from DVC's remote what is not here.
        checksums: File for the digests of what is published; None for none.
        propose: Bring ledger and releases to the default branch by a pull request.
        dry_run: Ask and say; change nothing.
        as_json: Print JSON.
    """

    pull: bool = False
    checksums: Path | None = None
    propose: bool = False
    dry_run: bool = False
    as_json: bool = False


def main(  # noqa: PLR0913 - one for each option
    declared: Declaration,
    at: Layout,
    *,
    model: str | None,
    to: str | None,
    environment: str | None = None,
    reason: str | None,
    options: Options | None = None,
) -> int:
    """
    Publish one model, or all, to a registry, or to all of an environment.

    One that is refused keeps no other from it.

    Args:
        declared: The declaration.
        at: The checkout.
        model: Key of the only model; None for all.
        to: Key of the registry; None if an environment is named.
        environment: Deployment environment; every registry that declares it.
        reason: For the ledger.
        options: How.

    Returns:
        0, or the exit code of the first model that was not published.

    Raises:
        ParamsError: The model, the registry or the environment is not declared.
    """
    options = options or Options()
    if model is not None:
        require_model(declared, model)
    registries = (to,) if to is not None else of_environment(declared, str(environment))
    run = _Run(declared, at, options, Mainline.of_run() if not options.dry_run else None)
    stores = {name: open_store(name, declared, at.root) for name in registries}
    by = {
        name: By.from_environment(
            require_reason(reason) if reason is not None else f"published to {name}"
        )
        for name in registries
    }
    for each in declared.models if model is None else (model,):
        run.publish(each, stores, by)
    run.finish(registries, environment)
    return run.failures.exit_code


def of_environment(declared: Declaration, environment: str) -> tuple[str, ...]:
    """
    Return the registries of a deployment environment, in the order of params.yaml.

    What the environment has as a login is lent to the one that it can only be of.

    Raises:
        ParamsError: There are none.
    """
    found = tuple(
        name for name, each in declared.registries.items() if each.environment == environment
    )
    if found:
        oci_login.lend({name: declared.registries[name].url for name in found})
        return found
    known = dict.fromkeys(
        each.environment for each in declared.registries.values() if each.environment
    )
    raise ParamsError(
        f"no registry of params.yaml declares the environment {wording.quoted(environment)}"
        f"{wording.did_you_mean(environment, known) or '.'}",
        hint="registries: NAME: {url: ..., environment: production}",
    )


@dataclass
class _Run:
    """One run over models and registries, and what came of each."""

    declared: Declaration
    at: Layout
    options: Options
    mainline: Mainline | None
    failures: Failures = field(default_factory=Failures)
    done: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    outdated: dict[str, OutdatedError] = field(default_factory=dict)
    released: dict[str, bytes] = field(default_factory=dict)
    models: list[str] = field(default_factory=list)

    def publish(self, model: str, stores: Mapping[str, Store], by: Mapping[str, By]) -> None:
        """Publish one model to every registry; what was brought for it goes when all have it."""
        brought = publish_pull.Brought()
        self.models.append(model)
        is_many = len(stores) > 1
        failed = len(self.failures.errors)
        for name, store in stores.items():
            what = f"{model} to {name}" if is_many else model
            with self.failures.of(what):
                try:
                    outcome = self._one(model, store, by[name], brought)
                except OutdatedError as error:
                    self.outdated[model] = error
                    console.warn(error.message)
                    console.info(f"  next: {error.hint}")
                    break
                self.done[model, name] = outcome
                if not self.options.as_json:
                    console.out(f"{model}: {outcome.sentence}")
        if len(self.failures.errors) == failed:
            brought.discard()

    def _one(self, model: str, store: Store, by: By, brought: publish_pull.Brought) -> Outcome:
        at, dry_run = self.at, self.options.dry_run
        slice_ = params.publish_slice(self.declared, model)
        shelves = Shelves(self.declared, at, model, dry_run=dry_run)
        if self.mainline is not None:
            self.mainline.require_current(model, at)
        bring = brought if self.options.pull else None
        if bring is not None and dry_run:
            missing = publish_pull.missing(slice_, at, store)
            if missing and _held(slice_, at, shelves, store, verdict_evidence.today()) is None:
                return _would_bring(missing, store)
        composed = to_publish(slice_, at, shelves, store, None if dry_run else bring)
        ledger = Ledger.load(at.ledger(model), model)
        if self.mainline is not None:
            if brought.size_bytes:  # that took its time
                self.mainline.require_current(model, at)
            self.mainline.acknowledge(model, store, ledger)
        if slice_.stable not in {LATEST, composed.id}:
            _bring_pinned(slice_.stable, shelves, store, ledger, by)
        outcome = publish(composed, store, ledger, stable=slice_.stable, by=by, dry_run=dry_run)
        self.released[model] = composed.data
        if not dry_run:
            # Last: what it names is in a registry.
            atomic.write_bytes(at.release(model), composed.data)
            atomic.remove(shelves.scratch)
        return outcome

    # what came of it

    def finish(self, registries: tuple[str, ...], environment: str | None) -> None:
        """Tell people, Actions and the default branch."""
        options = self.options
        moved = [key for key, outcome in self.done.items() if outcome.moved]
        files: tuple[Path, ...] = ()
        if options.checksums is not None and not options.dry_run:
            files = checksums.write(options.checksums, self.released.values())
            if len(files) > _ATTESTATIONS and console.in_actions():
                self.failures.add("attestation", _unattested(files))
        proposed = None
        if options.propose and not options.dry_run:
            with self.failures.of(LEDGER_BRANCH):
                proposed = self._propose()
        elif not (options.as_json or options.dry_run) and moved:
            console.info(
                "  next: git add results && git commit, so that every checkout knows of it"
            )
        if options.as_json:
            print_json(self._as_json(registries, environment, proposed))
        if options.dry_run:
            return
        runner.outputs(
            published=" ".join(
                model
                for model in self.models
                if all((model, name) in self.done for name in registries)
            ),
            moved=" ".join(dict.fromkeys(model for model, _ in moved)),
            checksums=str(files[0]) if files else "",
            checksums_rest=str(files[1]) if files[1:] else "",
            pull_request=proposed.url if proposed and proposed.url else "",
        )
        runner.summary(
            publish_words.summary(
                registries, self.done, self.failures.errors, self.outdated, proposed
            )
        )

    def _propose(self) -> Proposed:
        from pipelines import propose  # noqa: PLC0415 - only then
        from pipelines.github.client import GitHub  # noqa: PLC0415 - the same

        changes = [
            propose.ledger_change(self.at, model)
            for model in self.models
            if self.at.ledger(model).exists()
        ]
        changes += [propose.release_change(self.at, model) for model in self.released]
        gh = self.mainline.gh if self.mainline else GitHub.from_environment()
        proposed = propose.propose(
            gh,
            changes,
            branch=LEDGER_BRANCH,
            title="Ledger: what was published",
            body=publish_words.body(self.done),
        )
        if proposed.url:
            console.info(f"  {proposed.url} brings the ledger to the default branch")
        return proposed

    def _as_json(
        self, registries: tuple[str, ...], environment: str | None, proposed: Proposed | None
    ) -> dict[str, Any]:
        told: dict[str, Any] = {"dry_run": self.options.dry_run}
        by_registry = {
            name: {
                model: as_told(outcome)
                for (model, registry), outcome in self.done.items()
                if registry == name
            }
            for name in registries
        }
        if environment is None:
            told |= {"registry": registries[0], "models": by_registry[registries[0]]}
        else:
            told |= {"environment": environment, "registries": by_registry}
        if self.options.propose:
            told["pull_request"] = proposed.url if proposed else None
        told["outdated"] = {model: error.message for model, error in self.outdated.items()}
        return {**told, "errors": self.failures.as_json()}


def _unattested(files: tuple[Path, ...]) -> StoreError:
    count = sum(len(path.read_bytes().splitlines()) for path in files[_ATTESTATIONS:])
    limit = _ATTESTATIONS * checksums.MAX_SUBJECTS
    return StoreError(
        f"{wording.counted(count, 'file')} of what is published will not be attested: a run "
        f"attests {limit:,} of them, release.json and GGUFs first.",
        hint="Start the workflow once for each model: what is published already is not sent again.",
    )


def _would_bring(missing: tuple[publish_pull.Wanted, ...], store: Store) -> Outcome:
    size = shown_size(sum(each.digest.size_bytes for each in missing))
    return Outcome(
        release="",
        moved=None,
        uploaded_bytes=0,
        uploaded_count=0,
        restored=False,
        sentence=f"Would bring {wording.counted(len(missing), 'file')} ({size}) from DVC's remote, "
        f"compose a release of them and send it to {store.shown}.",
    )


def as_told(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome for `--json`."""
    move = json.loads(outcome.moved.model_dump_json()) if outcome.moved else None
    return {
        "release": outcome.release,
        "moved": move,
        "uploaded_bytes": outcome.uploaded_bytes,
        "uploaded_count": outcome.uploaded_count,
        "restored": outcome.restored,
        "sentence": outcome.sentence,
    }


def require_reason(text: str) -> str:
    """
    Return a reason as the ledger will say it.

    Raises:
        ParamsError: There is none in it, or it is too long to be read.
    """
    words = " ".join(console.clean(text).split())
    if not words or len(words) > _MAX_REASON_CHARACTERS:
        raise ParamsError(
            f"`--reason` is what the ledger will say for ever: 1 to {_MAX_REASON_CHARACTERS} "
            f"characters, not {len(words)}."
        )
    return words


def _bring_pinned(id_: str, shelves: Shelves, store: Store, ledger: Ledger, by: By) -> None:
    """Send the release that `stable` is pinned to, where only another registry has it."""
    model = shelves.model
    if Shelf(store, model).held(id_).is_whole:
        return
    pinned = shelves.find(id_)
    if pinned is None:
        raise StoreError(
            f"params.yaml wants release {short(id_)} of {model}, which no declared registry that "
            "can be reached holds whole.",
            hint=f"fleet releases {model} lists what can be served; "
            f"`fleet rollback {model} --to latest` ends the rollback.",
        )
    outcome = publish(pinned, store, ledger, stable=id_, by=by, dry_run=shelves.dry_run)
    console.info(f"{model}: {outcome.sentence}")


# --- what is published ------------------------------------------------------------------------


def to_publish(
    slice_: PublishSlice,
    at: Layout,
    shelves: Shelves,
    store: Store,
    brought: publish_pull.Brought | None = None,
) -> Composed:
    """
    Return the release of the records in git, from a registry that has it or from work/.

    Args:
        slice_: What is declared.
        at: The checkout.
        shelves: The declared registries.
        store: That it is for.
        brought: Where to note what is brought from DVC's remote; None to bring nothing.

    Raises:
        GateError: There may be none; every reason is in the message.
        FleetError: What has to be brought cannot be; see `publish_pull.bring`.
    """
    today = verdict_evidence.today()
    against = publish_hosts.refusals(shelves.declared, slice_, at, today=today)
    composed = Refused(reasons=against) if against else _held(slice_, at, shelves, store, today)
    if composed is None:
        if brought is not None:
            publish_pull.bring(slice_, at, store, brought)
        elsewhere = brought.elsewhere if brought is not None else None
        composed = release.compose(slice_, at, today=today, elsewhere=elsewhere)
    if isinstance(composed, Composed):
        return composed
    reasons = "".join(f"\n  - {reason}" for reason in composed.reasons)
    raise GateError(
        f"{slice_.model} is not published: "
        f"{wording.counted(len(composed.reasons), 'reason')}.{reasons}",
        hint="The release before stays where it is. `fleet report` shows the evidence.",
    )


def _held(
    slice_: PublishSlice, at: Layout, shelves: Shelves, store: Store, today: str
) -> Composed | Refused | None:
    """
    Return the release of the records in git as a registry holds it.

    That is the one of results/; or what `stable` means in the registry now, where the commit that
    says so waits to be merged.

    Returns:
        It; or why there may be none; or None if it has to be composed: the records are others than
        those it was made of, or no registry holds it whole.
    """
    candidates = tuple(_candidates(slice_.model, at, store))
    if not candidates:
        return None
    judged = release_gates.judge(verdict_evidence.collect(slice_, at, day=today))
    if judged.reasons:
        return Refused(reasons=judged.reasons)
    for id_, there in candidates:
        if is_of_records(there, slice_.model, judged, at):
            return shelves.find(id_)
    return None


def is_of_records(there: Release, model: str, judged: Judgement, at: Layout) -> bool:
    """Tell whether a release was made of the records in git, and of today's waivers."""
    is_ours = there.model == model and there.waivers == judged.waivers
    return is_ours and not _is_outdated(there, at)


def _candidates(model: str, at: Layout, store: Store) -> Iterator[tuple[str, Release]]:
    path = at.release(model)
    if path.exists():
        data = path.read_bytes()
        yield release_id(data), parse_release(data, release_id(data), path.name)
    # What is wrong there is said by whoever publishes to it.
    with contextlib.suppress(StoreError):
        alias, _ = store.read_alias(model, STABLE)
        if alias is not None:
            data = store.read_release(model, alias.release)
            yield alias.release, parse_release(data, alias.release, store.shown)


def _is_outdated(there: Release, at: Layout) -> bool:
    """
    Tell whether a record in git is another one than that of which the release was made.

    A comparison of one of its files that was made since is new evidence, too, and so is what was
    measured of the engine.
    """
    below = at.release(there.model).parent
    is_other = any(
        not (below / name).is_file() or hashing.digest(below / name).sha256 != sha256
        for name, sha256 in there.evidence.items()
    )
    files = {quant.gguf_sha256 for quant in there.quants}
    beside: tuple[tuple[Path, type[CompareRecord | EngineRecord]], ...] = (
        (at.comparison(there.model), CompareRecord),
        (at.engine_record(there.model), EngineRecord),
    )
    for path, kind in beside:
        if not is_other and path.name not in there.evidence and path.exists():
            found = records.read_or_reason(path, kind)
            is_other = not isinstance(found, str) and found.challenger.gguf_sha256 in files
    return is_other


@dataclass(frozen=True)
class Shelves:
    """
    The declared registries as sources of a release; files of a remote one come to `scratch`.

    With `dry_run` nothing is fetched: the paths of what would be are not there.
    """

    declared: Declaration
    at: Layout
    model: str
    dry_run: bool

    @property
    def scratch(self) -> Path:
        """Where fetched files lie until they were sent on."""
        return self.at.scratch(self.model) / "publish"

    def find(self, id_: str) -> Composed | None:
        """Return a release from the first registry that has it whole; the local one comes first."""
        for name in names(self.declared):
            try:
                store = open_store(name, self.declared, self.at.root)
                held = Shelf(store, self.model).held(id_)
                if held.release is not None and held.is_whole:
                    return self._from(store, id_, held.release)
            except (StoreError, RetryLaterError) as error:
                console.warn(f"{name}: {error.message}")
        return None

    def _from(self, store: Store, id_: str, found: Release) -> Composed:
        data = store.read_release(self.model, id_)
        files = {file.sha256: file for file in found.files}
        if isinstance(store, LocalStore):
            sources = {sha256: store.root / "blobs/sha256" / sha256 for sha256 in files}
        else:
            sources = {sha256: self.scratch / sha256 for sha256 in files}
            if not self.dry_run:
                self._fetch(store, files)
        blobs = tuple(
            Blob(
                name=file.name,
                sha256=sha256,
                size_bytes=file.size_bytes,
                media_type=file.media_type,
                source=sources[sha256],
            )
            for sha256, file in files.items()
        )
        return Composed(release=found, data=data, id=id_, blobs=blobs)

    def _fetch(self, store: Store, files: Mapping[str, ReleaseFile]) -> None:
        total_bytes = sum(file.size_bytes for file in files.values())
        with Progress(f"fetching {self.model} from {store.name}", total_bytes) as progress:
            for sha256, file in files.items():
                on_bytes = progress.of(file.name, file.size_bytes)
                read_to(store, self.model, file, self.scratch / sha256, on_bytes)
