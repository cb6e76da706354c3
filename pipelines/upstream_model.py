"""
One model of a look at upstream: what is tracked, what is proven of it, what follows.

    1 request    nothing moved, or nothing since the look before
    + 1          the listing of the declared commit
    + 1          the commits between, as many pages as it takes to meet the declared one
    + a few      small files of both sides and the headers of the weights (`upstream_difference`)

What moved is never proposed without a proof. The proof is kept with the difference, so that it is
made once for each pair of commits.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from pipelines import dvc_state, fetch, hashing, records, wording
from pipelines.errors import DigestError, FleetError, UpstreamError
from pipelines.hub import RemoteFile
from pipelines.hub_metadata import TITLES_KEPT, DoubtError
from pipelines.records import FetchRecord
from pipelines.upstream_records import ModelUpstream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipelines.hub_metadata import Head, Reader
    from pipelines.layout import Layout
    from pipelines.params import Declaration
    from pipelines.upstream_records import Difference, Doubt, State

# Of a time to come: clocks differ by less than this.
_SLACK: Final = timedelta(hours=1)
_SAFE_NAME: Final = re.compile(r"(?:1_Pooling/)?[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_SENTENCE_CHARACTERS: Final = 2000
_HERE_STAYS: Final = (
    "What was fetched of it, and every release that was made of it, stays and can be served."
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    What one model is looked at with.

    Attributes:
        at: The checkout.
        declared: Its declaration.
        model: Key of the model.
        before: What the look before found of it; None if there was none.
        now: The time of day of this look.
        reader: Who asks the Hub.
        architectures: Returns the names that the pinned converter knows; None if it is not here.
        is_stage: Whether nobody asked for the look by name, so that it should cost little.
    """

    at: Layout
    declared: Declaration
    model: str
    before: ModelUpstream | None
    now: datetime
    reader: Reader
    architectures: Callable[[], frozenset[str] | None]
    is_stage: bool = False


def look(subject: Subject) -> ModelUpstream:
    """Look at one model; whatever goes wrong upstream is a state of it and no error."""
    return _Look(subject).result()


def silent(subject: Subject, reason: str, hint: str = "") -> ModelUpstream:
    """Return what is left to say of a model that could not be asked."""
    return _Look(subject).unknown(reason, hint)


class _Look:
    """One look at one model."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._spec = subject.declared.models[subject.model]
        self._pinned = self._spec.revision
        kind, _, self._place = self._spec.source.partition(":")
        self._is_hub = kind == "hf"
        before = subject.before
        # Another source is another story.
        self._before = before if before and before.source == self._spec.source else None
        self._head: Head | None = None

    def result(self) -> ModelUpstream:
        """Look."""
        try:
            return self._of_hub() if self._is_hub else self._of_directory()
        except DoubtError as error:
            return self._asks(error)
        except FleetError as error:
            return self.unknown(error.message, error.hint)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return self.unknown(f"{where}{error.strerror or error}.", "Look at that file.")
        except ValidationError as error:
            # One hostile repository keeps no other model back.
            what = error.errors(include_url=False, include_input=False)[0]["msg"]
            return self.unknown(
                f"what hf:{self._place} says fits into no record: {what}.", "Look at its page."
            )

    # --- a repository of the Hub ---

    def _of_hub(self) -> ModelUpstream:
        head = self._head = self._subject.reader.look(self._place, self._spec.track)
        self._require_same_repository(head)
        if head.sha == self._pinned:
            return self._told("current", self._current_words(head))
        if head.sha in self._spec.ignore:
            reason = f"{_named(head)} is newer, and `ignore` passes over it."
            return self._told("ignored", reason)
        known = self._proven(head)
        if known is not None and known.state == "current":
            return self._told("current", known.reason)
        if known is not None:
            return self._judged(head, known.difference, known.commits)
        return self._proved(head)

    def _require_same_repository(self, head: Head) -> None:
        """
        See that what answers is the repository that was declared and known.

        Raises:
            DoubtError: It is not.
        """
        if head.id != self._place:
            raise DoubtError(
                "renamed",
                f"hf:{self._place} answers as {head.id}: it was renamed or taken over.",
                hint=f"If you trust {head.id}, declare `source: hf:{head.id}`.",
            )
        if head.disabled:
            raise DoubtError(
                "disabled", f"hf:{head.id} was disabled by the Hub. {_HERE_STAYS}",
                hint="Look at its page, or declare another source.",
            )  # fmt: skip
        owner, id_ = self._trusted
        if owner is not None and head.owner is not None and owner != head.owner:
            raise DoubtError(
                "owner",
                f"hf:{head.id} belongs to {head.owner} now, and belonged to {owner}.",
                hint=self._trust_hint(head),
            )
        if id_ is not None and head.repository_id is not None and id_ != head.repository_id:
            raise DoubtError(
                "owner",
                f"hf:{head.id} is another repository under the same name: it was deleted and made "
                "again, by whomever.",
                hint=self._trust_hint(head),
            )

    def _trust_hint(self, head: Head) -> str:
        if head.sha == self._pinned:
            return "Look at its page. If you do not trust it, declare another source."
        return (
            f"Look at its page. If you trust it, declare `revision: {head.sha}` by hand; if not, "
            "declare another source."
        )

    @cached_property
    def _trusted(self) -> tuple[str | None, str | None]:
        """
        Return owner and id of the repository that was known before; None of what was not.

        Who changes the declared revision by hand to what was shown with a doubt has decided.
        """
        before = self._before
        if before is None:
            return None, None
        newest = {before.newest, self._head.sha if self._head else None}
        if before.state == "asks" and before.pinned != self._pinned and self._pinned in newest:
            return None, None
        return before.owner, before.repository_id

    def _current_words(self, head: Head) -> str:
        """Say that nothing is newer; and if something was, that upstream took it back."""
        text = "What is declared is the newest."
        before = self._before
        took_back = (
            before is not None
            and before.pinned == self._pinned
            and before.track == self._spec.track
            and before.newest not in {None, self._pinned}
            and before.state != "current"
        )
        if took_back:
            text += f" {str(before and before.newest)[:12]}, which was seen before, is taken back."
        return f"{text}{self._gate_words(head)}"

    def _gate_words(self, head: Head) -> str:
        """Say that a repository is gated which was open when its files were fetched."""
        if head.gated is None:
            return ""
        known = records.read_or_reason(
            self._subject.at.model_record("fetch", self._subject.model), FetchRecord
        )
        if isinstance(known, str) or known.gated is not None:
            return ""
        return f" It is gated now ({head.gated}) and was not when it was fetched."

    # --- the proof ---

    def _proven(self, head: Head) -> ModelUpstream | None:
        """Return the look before if it has proven this very pair of commits, either way."""
        before = self._before
        if before is None or (before.pinned, before.newest) != (self._pinned, head.sha):
            return None
        if before.state == "asks" and before.doubt == "history":
            raise DoubtError("history", before.reason, hint=before.next_step)
        is_ahead = before.state == "current" and before.track == self._spec.track
        known = before.difference
        # What was refused may be a matter of our own tools, which may be others now.
        return before if is_ahead or (known is not None and not known.refusals) else None

    def _proved(self, head: Head) -> ModelUpstream:
        """
        Prove that the newest commit follows the declared one, and say what lies between.

        Raises:
            DoubtError: It does not; or the files of it could not be built or verified.
        """
        reader = self._subject.reader
        try:
            old = reader.at(self._place, self._pinned)
        except DoubtError as error:
            if error.doubt != "revision-gone":
                raise
            raise self._gone_doubt(head) from error
        if (old.id, old.repository_id) != (head.id, head.repository_id):
            raise DoubtError(
                "owner", f"hf:{self._place} became another repository while we looked.",
                hint="Look again.",
            )  # fmt: skip
        way = reader.commits(self._place, head.sha, self._pinned)
        if not way.is_ancestor:
            # Which of the two ways there is none, decides what to say.
            back = reader.commits(self._place, self._pinned, head.sha)
            if back.is_ancestor and "*" in self._spec.track:
                return self._told(
                    "current", f"What is declared is newer than {_named(head)}, the newest tag."
                )
            raise self._history_doubt(head, way.looked_count, went_back=back.is_ancestor)
        _require_usable(head)
        difference = self._difference(old, head)
        return self._judged(head, difference, way.titles)

    def _gone_doubt(self, head: Head) -> DoubtError:
        """Say that the declared commit is not there: gone, if it was ever seen."""
        known = records.read_or_reason(
            self._subject.at.model_record("fetch", self._subject.model), FetchRecord
        )
        if isinstance(known, str) or known.revision != self._pinned:
            text = (
                f"hf:{self._place} has no commit {self._pinned[:12]}: it is mistyped, or upstream "
                "rewrote its history."
            )
            hint = f"Look at its commits on the Hub; the newest is {head.sha}."
            return DoubtError("revision-gone", text, hint=hint)
        return DoubtError(
            "revision-gone",
            f"the declared commit {self._pinned[:12]} is gone from hf:{self._place}: its "
            f"history was rewritten. {_HERE_STAYS}",
            hint=f"Keep what is here, or look at {head.sha} on the Hub and declare it as "
            "`revision` by hand.",
        )

    def _history_doubt(self, head: Head, looked_count: int, *, went_back: bool) -> DoubtError:
        if went_back:
            text = (
                f"{self._spec.track} of hf:{self._place} went back to {head.sha[:12]}, which is "
                f"older than the declared commit {self._pinned[:12]}."
            )
        else:
            text = (
                f"the declared commit {self._pinned[:12]} is not in the history of {_named(head)} "
                f"({wording.counted(looked_count, 'commit')} looked through): its history was "
                "rewritten, or it is another line of work."
            )
        return DoubtError(
            "history",
            f"{text} {_HERE_STAYS}",
            hint=f"Look at the commits on the Hub. If you trust {head.sha}, declare it as "
            "`revision` by hand; else name it in `ignore`.",
        )

    def _difference(self, old: Head, new: Head) -> Difference:
        """
        Compare the files.

        Raises:
            DoubtError: A file cannot be had, also where the comparison can do without it: what is
                gated now could not be fetched.
            RetryLaterError, DigestError, UpstreamError: It cannot be had now, or is not as listed.
        """
        from pipelines import upstream_difference  # noqa: PLC0415 - only for what moved

        reader, repo = self._subject.reader, self._place
        doubts: list[DoubtError] = []

        @contextmanager
        def noted() -> Iterator[None]:
            try:
                yield
            except DoubtError as error:
                doubts.append(error)
                raise

        def side(head: Head) -> upstream_difference.Side:
            def read(file: RemoteFile) -> bytes:
                with noted():
                    return reader.read_file(repo, head.sha, file, fetch.MAX_SMALL_FILE_BYTES)

            def read_range(file: RemoteFile, start: int, end: int) -> bytes:
                with noted():
                    return reader.read_range(repo, head.sha, file.name, start, end)

            return upstream_difference.Side(head.sha, head.files, read, read_range)

        found = upstream_difference.difference(
            side(old),
            side(new),
            known_architectures=self._subject.architectures(),
            ignore_code=self._spec.ignore_code,
        )
        if doubts:
            raise doubts[0]
        return found

    # --- what follows ---

    def _judged(
        self, head: Head, difference: Difference | None, commits: tuple[str, ...]
    ) -> ModelUpstream:
        """Decide what to do about something newer that is proven."""
        found: dict[str, Any] = {"difference": difference, "commits": commits}
        if difference is not None and difference.refusals:
            return self._told(
                "asks",
                f"{_named(head)} is newer and cannot be built. {' '.join(difference.refusals)}",
                doubt="unusable",
                next_step="Wait for the next commit, or declare another source. If llama.cpp is "
                "too old for it: fleet bump --engine llama.cpp",
                **found,
            )
        what = what_words(difference, len(commits))
        section = self._subject.declared.check_upstream
        if difference is not None and _is_card(difference, cards=section.cards):
            return self._told("card", f"{_named(head)} is newer, with {what}.", **found)
        seen_after = self._seen_after(head)
        arrived_at = max(
            (when for when in (self._believed_time(head), seen_after) if when is not None),
            default=self._subject.now,
        )
        days = self._spec.cooldown_days
        ripe_at = arrived_at + timedelta(days=section.cooldown_days if days is None else days)
        found["seen_after"] = seen_after
        if self._subject.now < ripe_at:
            return self._told(
                "waiting",
                f"{_named(head)} is newer, with {what}; it is too young to be proposed"
                f"{self._why_young(head, seen_after)}.",
                next_step=f"It is proposed from {ripe_at:%Y-%m-%d %H:%M} UTC on "
                "(`cooldown_days`), if it is still the newest then.",
                **found,
            )
        return self._told(
            "moved",
            f"{_named(head)} is newer, with {what}.{self._gate_words(head)}",
            next_step=f"fleet bump {self._subject.model}",
            **found,
        )

    def _why_young(self, head: Head, seen_after: datetime | None) -> str:
        """Say by which clock, where that is not the Hub's."""
        told = self._believed_time(head)
        if seen_after is None or (told is not None and told >= seen_after):
            return ""
        return f": by what was seen here, it came after {seen_after:%Y-%m-%d %H:%M} UTC"

    def _believed_time(self, head: Head) -> datetime | None:
        """Return when the Hub got the commit; a time to come is none."""
        told = head.last_modified
        return told if told is not None and told <= self._subject.now + _SLACK else None

    def _seen_after(self, head: Head) -> datetime | None:
        """
        Return since when at the earliest it was the newest, by what we saw ourselves.

        A time that upstream tells can be set back; a look that saw something else cannot. Where
        the Hub tells none, the clock begins when we first see the commit.
        """
        before = self._before
        known = None
        if before is not None and before.track == self._spec.track:
            is_same = before.newest == head.sha
            known = before.seen_after if is_same else before.newest and before.last_success_at
        return known or (None if self._believed_time(head) else self._subject.now)

    def _told(
        self, state: State, reason: str, *, doubt: Doubt | None = None, next_step: str = "",
        **found: Any,  # noqa: ANN401 - fields of ModelUpstream
    ) -> ModelUpstream:  # fmt: skip
        """Compose the record of an answer."""
        head = self._head
        owner, id_ = self._trusted
        # In doubt, what was known before stays what the next look is held against.
        if head is not None and (state != "asks" or (owner, id_) == (None, None)):
            owner, id_ = head.owner or owner, head.repository_id or id_
        if head is not None:
            found = {
                "newest": head.sha,
                "newest_tag": head.tag and wording.shortened(head.tag, 200),
                "newest_at": head.last_modified,
            } | found
        return self._record(
            state=state,
            doubt=doubt,
            reason=reason,
            next_step=next_step,
            owner=owner,
            repository_id=id_,
            last_success_at=self._subject.now,
            **found,
        )

    def _asks(self, error: DoubtError) -> ModelUpstream:
        return self._told("asks", error.message, doubt=error.doubt, next_step=error.hint)

    def unknown(self, reason: str, hint: str) -> ModelUpstream:
        """Keep what the last success found, and say why there is nothing newer to say."""
        before = self._before
        kept: dict[str, Any] = {}
        if before is not None:
            kept = before.model_dump(include={"owner", "repository_id", "last_success_at"})
            if before.pinned == self._pinned:
                names = ("newest", "newest_tag", "newest_at", "difference", "commits", "seen_after")
                kept |= {name: getattr(before, name) for name in names}
                again = before.state == "unknown"
                kept["last_state"] = before.last_state if again else before.state
                kept["last_reason"] = before.last_reason if again else before.reason
        return self._record(state="unknown", reason=reason, next_step=hint, **kept)

    def _record(self, **fields: Any) -> ModelUpstream:  # noqa: ANN401 - of ModelUpstream
        before = self._before
        first = before.first_asked_at if before is not None else None
        texts = {
            name: wording.shortened(fields.get(name) or "", _SENTENCE_CHARACTERS)
            for name in ("reason", "next_step")
        }
        return ModelUpstream(
            model=self._subject.model,
            source=self._spec.source,
            track=self._spec.track,
            pinned=self._pinned,
            first_asked_at=first or self._subject.now,
            **(fields | texts),
        )

    # --- a directory of the checkout ---

    def _of_directory(self) -> ModelUpstream:
        """Hold a directory against its declared digest: no network, no age, nothing to prove."""
        directory = self._subject.at.root / self._place
        try:
            listing = fetch.LocalDirectory(directory).files()
            if self._subject.is_stage and _sum(listing) > dvc_state.WORTH_BYTES:
                return self._directory_unread(directory)
            digest = fetch.content_digest(directory)
        except UpstreamError as error:
            raise DoubtError("unusable", error.message, hint=error.hint) from error
        if digest == self._pinned:
            return self._told("current", "The directory is what is declared.", newest=digest)
        if digest in self._spec.ignore:
            return self._told(
                "ignored", "The directory is not what is declared, and `ignore` passes over that.",
                newest=digest,
            )  # fmt: skip
        difference = self._directory_difference(directory, listing, digest)
        what = what_words(difference, 0)
        if difference is None:
            what = f"{what}: `fleet fetch {self._subject.model}` of the declared files was not run"
        elif _is_card(difference, cards=self._subject.declared.check_upstream.cards):
            # Who edits a file here means it, and fetch refuses any other content than declared.
            what = f"{what} alone"
        return self._told(
            "moved",
            f"{self._place} is {digest[:12]} now, with {what}.",
            next_step=f"fleet bump {self._subject.model} --local",
            newest=digest,
            difference=difference,
        )

    def _directory_unread(self, directory: Path) -> ModelUpstream:
        """Leave the bytes of a large directory to whoever asks by name, and to fetch."""
        by_name = f"fleet check-upstream {self._subject.model}"
        known = records.read_or_reason(
            self._subject.at.model_record("fetch", self._subject.model), FetchRecord
        )
        if isinstance(known, str) or known.revision != self._pinned:
            return self.unknown("the directory is large and was not read.", by_name)
        if flaw := fetch.revision_flaw(directory, self._pinned, known):
            return self.unknown(flaw, by_name)
        return self._told(
            "current",
            "The directory has the files and sizes that are declared; its bytes are read by "
            f"`{by_name}` and by fetch.",
        )

    def _directory_difference(
        self, directory: Path, listing: tuple[RemoteFile, ...], digest: str
    ) -> Difference | None:
        """Compare with what was fetched of the declared revision, if that is still here."""
        from pipelines import upstream_difference  # noqa: PLC0415 - only for what moved

        at, model = self._subject.at, self._subject.model
        known = records.read_or_reason(at.model_record("fetch", model), FetchRecord)
        if isinstance(known, str) or known.revision != self._pinned:
            return None
        old = tuple(
            RemoteFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in known.files
        )
        new = tuple(
            RemoteFile(
                name=file.name,
                size_bytes=file.size_bytes,
                sha256=hashing.digest(directory / file.name).sha256,
            )
            for file in listing
        )

        def side(revision: str, folder: Path, files: tuple[RemoteFile, ...]) -> Any:  # noqa: ANN401
            return upstream_difference.Side(
                revision, files, partial(_read, folder), partial(_read_range, folder)
            )

        try:
            return upstream_difference.difference(
                side(self._pinned, at.source(model), old),
                side(digest, directory, new),
                known_architectures=self._subject.architectures(),
                ignore_code=self._spec.ignore_code,
            )
        except (FleetError, OSError):
            return None  # what was fetched is not here, or not whole: nothing to compare with


def what_words(difference: Difference | None, commits_count: int) -> str:
    """Say what changed: `other weights and template (3 files, 2 commits)`."""
    counts = []
    if difference is not None:
        counts.append(wording.counted(difference.files_count, "file"))
    if commits_count:
        more = "or more " if commits_count >= TITLES_KEPT else ""
        counts.append(f"{commits_count} {more}{'commit' if commits_count == 1 else 'commits'}")
    told = f" ({', '.join(counts)})" if counts else ""
    if difference is None:
        return f"what could not be compared{told}"
    classes = wording.listed(list(difference.classes))
    return f"{f'other {classes}' if classes else 'no file of a build changed'}{told}"


def _named(head: Head) -> str:
    tag = f" ({wording.shortened(head.tag, 60)})" if head.tag else ""
    return f"{head.sha[:12]}{tag}"


def _is_card(difference: Difference, *, cards: bool) -> bool:
    """Tell whether nothing that anybody wants to hear of changed."""
    classes = set(difference.classes)
    return not classes or (not cards and classes == {"card"})


def _require_usable(head: Head) -> None:
    """
    See that the files of a build can be verified, and have names that we would write.

    Raises:
        DoubtError: They cannot, or have not.
    """
    hint = "Wait for the next commit, or ask upstream."
    if odd := sorted({name for name in head.undigested if _is_built(name)}):
        raise DoubtError(
            "unusable",
            f"{head.sha[:12]} lists {wording.first_few(odd)} twice, or without size or digest: "
            "nobody could verify it.",
            hint=hint,
        )
    names = [file.name for file in head.files if _is_built(file.name)]
    if odd := sorted(name for name in names if not _SAFE_NAME.fullmatch(name)):
        raise DoubtError(
            "unusable", f"{head.sha[:12]} has {wording.first_few(odd)}, no name for a file.",
            hint=hint,
        )  # fmt: skip


def _is_built(name: str) -> bool:
    """Tell whether a build reads files of that name."""
    patterns = (*fetch.SMALL_FILES, fetch.WEIGHTS)
    return name == fetch.POOLING or (
        "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
    )


def _sum(files: tuple[RemoteFile, ...]) -> int:
    return sum(file.size_bytes for file in files)


def _read(folder: Path, file: RemoteFile) -> bytes:
    """
    Read a file of a directory, held against its digest.

    Raises:
        DigestError: It is another one.
    """
    data = (folder / file.name).read_bytes()
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DigestError(f"{folder / file.name} is not what it was.")
    return data


def _read_range(folder: Path, file: RemoteFile, start: int, end: int) -> bytes:
    with (folder / file.name).open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start)
