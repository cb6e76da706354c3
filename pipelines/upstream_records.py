"""
What a look at upstream found: results/upstream.json.

Only `check-upstream` writes it, and nothing is built of it: it is what a person, `bump` and the
report read. It is not in git; the next look makes it again. Every text in it may be a stranger's:
it is bounded here, and escaped where it is shown.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field, StringConstraints

from pipelines.params import MODEL_KEY, REVISION, SHA256
from pipelines.records import Part, Record

# What changed, from what costs most to what costs nothing.
ChangeClass = Literal["weights", "tokenizer", "template", "config", "generation", "licence", "card"]
CLASSES: Final[tuple[ChangeClass, ...]] = (
    "weights", "tokenizer", "template", "config", "generation", "licence", "card",
)  # fmt: skip
# current   what is declared is the newest
# moved     there is something newer, and it may be proposed
# waiting   there is something newer that is younger than `cooldown_days`
# ignored   there is something newer that somebody does not want
# card      there is something newer that differs in nothing but the card, or in no file of a build
# asks      a person has to look: renamed, gone, gated, another owner, another history
# unknown   it could not be asked
State = Literal["current", "moved", "waiting", "ignored", "card", "asks", "unknown"]
# Why a person has to look.
Doubt = Literal[
    "renamed", "gone", "gated", "disabled", "owner", "history", "revision-gone", "track-gone",
    "unusable",
]  # fmt: skip
Engine = Literal["llama.cpp", "ollama"]

Word = Annotated[str, StringConstraints(max_length=200)]
Sentence = Annotated[str, StringConstraints(max_length=2000)]
Commit = Annotated[str, StringConstraints(pattern=REVISION)]
Size = Annotated[int, Field(ge=0, le=1 << 60)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]


class FileState(Part):
    """One version of a file: its size, and sha256 or, of a file in git itself, its blob id."""

    size_bytes: Size
    sha256: Annotated[str, StringConstraints(pattern=SHA256)] | None = None
    git_sha1: Commit | None = None


class FileChange(Part):
    """A file that a build reads and that is not what it was; `old` or `new` is None if absent."""

    name: Word
    kind: ChangeClass
    old: FileState | None
    new: FileState | None


class TensorChanges(Part):
    """
    What the headers of the weights say, before a byte of a weight is fetched.

    Attributes:
        compared_count: Tensors of the new revision whose header was read.
        added, removed: Names that only one side has; the first ones, with the count of all.
        retyped: `NAME: OLD -> NEW`, of shape or dtype.
        touched_count: Tensors in changed files that look the same: their values may differ.
        same_count: Tensors in files that did not change a byte.
        header_bytes: That were fetched to know it.
    """

    compared_count: Count
    added: Annotated[tuple[Word, ...], Field(max_length=20)] = ()
    added_count: Count = 0
    removed: Annotated[tuple[Word, ...], Field(max_length=20)] = ()
    removed_count: Count = 0
    retyped: Annotated[tuple[Word, ...], Field(max_length=20)] = ()
    retyped_count: Count = 0
    touched_count: Count = 0
    same_count: Count = 0
    header_bytes: Size = 0


class Difference(Part):
    """
    What lies between the declared and the newest revision.

    Attributes:
        classes: What changed, each once, in the order of `CLASSES`; empty if no file of a build.
        files: Every changed file of a build; the first 100.
        files_count: All of them.
        tensors: None if no weight changed, or if the headers could not be read (see `notes`).
        stages: That have to run again, by the words of the graph.
        download_bytes: Of files that are not here and not in the declared revision.
        notes: Sentences: template, tokenizer, licence, configuration, in words.
        refusals: Those of `notes` by which fetch or convert would not take the new revision.
        details: What is shown folded, title -> text (a unified diff, say); a stranger's.
    """

    classes: tuple[ChangeClass, ...]
    files: Annotated[tuple[FileChange, ...], Field(max_length=100)]
    files_count: Count
    tensors: TensorChanges | None
    stages: Annotated[tuple[Word, ...], Field(max_length=20)]
    download_bytes: Size
    notes: Annotated[tuple[Sentence, ...], Field(max_length=50)] = ()
    refusals: Annotated[tuple[Sentence, ...], Field(max_length=20)] = ()
    details: dict[Word, Annotated[str, StringConstraints(max_length=20_000)]] = Field(
        default_factory=dict
    )


class ModelUpstream(Part):
    """
    One model.

    Attributes:
        source: As declared.
        track: As declared; what `newest` is the newest of.
        pinned: The declared revision.
        newest: Commit; None if it could not be asked or is not there.
        newest_tag: Tag that it has, where tags are tracked.
        newest_at: When the Hub got it, by its own clock.
        state: What follows.
        doubt: Of `asks`: why.
        reason: One sentence for people; of `moved`, what changed.
        next_step: What to do; may be empty.
        owner: Of the repository, as the Hub names it.
        repository_id: The Hub's own id of the repository; another one under the same name is
            another repository.
        difference: None unless there is something newer.
        commits: Titles of the commits between, newest first; a stranger's.
        last_success_at: When it was last asked with success; None if never.
        first_asked_at: When it was asked for the first time: silence is counted from here where
            there was no success yet.
        seen_after: The last look with success that saw something else as the newest. So long is
            what is now the newest not there, whatever its own time says.
        last_state, last_reason: Of `unknown`: what the last success came to.
    """

    model: Annotated[str, StringConstraints(pattern=MODEL_KEY)]
    source: Annotated[str, StringConstraints(max_length=300)]
    track: Word
    pinned: Commit
    newest: Commit | None = None
    newest_tag: Word | None = None
    newest_at: AwareDatetime | None = None
    state: State
    doubt: Doubt | None = None
    reason: Sentence
    next_step: Sentence = ""
    owner: Word | None = None
    repository_id: Word | None = None
    difference: Difference | None = None
    commits: Annotated[tuple[Word, ...], Field(max_length=50)] = ()
    last_success_at: AwareDatetime | None = None
    first_asked_at: AwareDatetime | None = None
    seen_after: AwareDatetime | None = None
    last_state: State | None = None
    last_reason: Sentence = ""


class EngineUpstream(Part):
    """
    One engine.

    Attributes:
        pinned: The declared version.
        newest: The newest release that may be proposed: no pre-release, not withdrawn, not ignored,
            old enough. If none may be, the newest of those that are newer; None if unknown.
        sha256: Of its sdist, by the package index's own metadata; of Ollama that of the release
            archive, where one is declared.
        size_bytes: Of the same file.
        newest_at: When it was uploaded or tagged; None if nobody tells.
        state: `current`, `moved`, `waiting`, `ignored`, `asks` or `unknown`.
        versions_between: Releases between the two, newest first.
        younger: The newest release of all, where it is younger than `newest` and has to wait.
        first_seen: When a look first saw a release that is newer than `pinned`.
        notes: Sentences on what else there is to know, such as a Go that is too old.
        requests_count: Of this look to package indexes and to GitHub; a question to Go, which sends
            some of its own, is one.
        reason, next_step, last_success_at, first_asked_at: See `ModelUpstream`.
    """

    engine: Engine
    pinned: Word
    newest: Word | None = None
    sha256: Annotated[str, StringConstraints(pattern=SHA256)] | None = None
    size_bytes: Size | None = None
    newest_at: AwareDatetime | None = None
    state: State
    versions_between: Annotated[tuple[Word, ...], Field(max_length=50)] = ()
    younger: Word | None = None
    first_seen: Annotated[dict[Word, AwareDatetime], Field(max_length=50)] = Field(
        default_factory=dict
    )
    notes: Annotated[tuple[Sentence, ...], Field(max_length=20)] = ()
    requests_count: Count = 0
    reason: Sentence
    next_step: Sentence = ""
    last_success_at: AwareDatetime | None = None
    first_asked_at: AwareDatetime | None = None


class UpstreamRecord(Record):
    """
    One look.

    Attributes:
        checked_at: When.
        requests_count: That were sent to the Hub, repeats and redirects included.
        alarms: One sentence for each model or engine that was silent for two periods.
        params_sha256: Of params.yaml, if this was a look at all of it; None if it was a part.
        next_at: When the next look is due, as declared then.
    """

    stage: Literal["check-upstream"] = "check-upstream"
    checked_at: AwareDatetime
    requests_count: Count
    models: tuple[ModelUpstream, ...]
    engines: tuple[EngineUpstream, ...] = ()
    alarms: tuple[Sentence, ...] = ()
    params_sha256: Annotated[str, StringConstraints(pattern=SHA256)] | None = None
    next_at: AwareDatetime | None = None


class UpstreamNotices(Record):
    """
    What the report says of upstream: work/upstream.json, the same bytes until that changes.

    Attributes:
        alarms: See `UpstreamRecord`, without the times.
        asks: One sentence for each model about which a person has to decide.
        moved: One sentence for each model or engine of which there is something newer to propose.
    """

    stage: Literal["check-upstream"] = "check-upstream"
    alarms: tuple[Sentence, ...] = ()
    asks: tuple[Sentence, ...] = ()
    moved: tuple[Sentence, ...] = ()
