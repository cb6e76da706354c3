"""
`hf:` the Hugging Face Hub: one repository of models for each model, readable by everybody's tools.

    <owner>/<model>-GGUF
      tag and branch release-<id12>   a release: one commit, made whole, then tagged
      main                            what `stable` means: one commit for each move
        *.gguf *.Modelfile LICENSE..  files that people look for, by their names
        template system params        for `ollama pull hf.co/<owner>/<model>-GGUF:<TYPE>`
        fleet/blobs/<sha256>          files that Ollama and the readers of ModelPacks want
        fleet/aliases/stable.json     the alias and its moves
        release.json  README.md       the release, and its card

Large files go to the repository's LFS storage first, where the Hub keeps them under their sha256:
a publisher that was killed sends none of them again. They mean nothing before a commit names them.
A move of `stable` is one commit on main that must follow the commit that was read; its large files
are copied within the Hub, so a move to any release, forward or back, sends none of their bytes.

What the Hub says of a file (sha256 and size in the tree of a commit) is held against the release
before its tag is made and again before an alias moves; small files are read back. Large ones are
read back when another release names them, by `fleet verify-registry`, and by everybody who pulls.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeVar

from huggingface_hub import CommitOperationCopy, CommitOperationDelete, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from pydantic import ValidationError

from pipelines import console, model_card, wording
from pipelines.errors import DigestError, StoreError
from pipelines.release_records import (
    SHORT_CHARACTERS,
    Alias,
    Release,
    ReleaseFile,
    alias_bytes,
    parse_alias,
    release_bytes,
    release_id,
    short,
)
from pipelines.stores import transfer
from pipelines.stores.base import (
    AliasMovedError,
    Blob,
    Guarantees,
    NotThereError,
    OnBytes,
    StoredBlob,
    Token,
    hash_blob,
)
from pipelines.stores.huggingface_client import Addition, ConflictError, Hub, Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from huggingface_hub import CommitOperationAdd, GitRefInfo

    from pipelines.params import Registry

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

T = TypeVar("T")

# https://huggingface.co/docs/hub/storage-limits: "500GB is the hard limit for a single file size".
MAX_FILE_BYTES: Final = 500_000_000_000
_MIB: Final = 2**20
_SUFFIX: Final = "-GGUF"
_MAIN: Final = "main"
_RELEASE_FILE: Final = "release.json"
_CARD_FILE: Final = "README.md"
_ALIASES: Final = "fleet/aliases/"
_BLOBS: Final = "fleet/blobs/"
_RELEASE_REF: Final = re.compile(rf"release-([0-9a-f]{{{SHORT_CHARACTERS}}})")
# A commit of git, by SHA-1 or by SHA-256.
_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
# What people look for by name; the rest is for programs, by digest.
_BY_NAME: Final = frozenset({"gguf", "imatrix", "modelfile", "license"})
# Layers of Ollama's that the Hub takes over from files of these names when Ollama pulls from it.
_OLLAMA_FILES: Final = ("template", "system", "params")
_RESERVED: Final = frozenset({_RELEASE_FILE, _CARD_FILE.lower(), "fleet", *_OLLAMA_FILES})
# A release or an alias that is larger is none.
_MAX_DOCUMENT_BYTES: Final = 64 << 20
# How long the answer about branches and tags serves for finding files: a release has dozens of
# them, and the Hub counts requests. Where an alias or a release is read or written they are asked
# for anew.
_REFS_SERVE_S: Final = 2.0
# How often a step is decided anew since somebody else commits to the same branch.
_MAX_ROUNDS: Final = 5


@dataclass(frozen=True)
class _Refs:
    """Where branches and tags of a repository are, by commit."""

    branches: dict[str, str]
    tags: dict[str, str]

    @property
    def head(self) -> str | None:
        """What main means; None of a repository without a commit."""
        return self.branches.get(_MAIN)

    @property
    def releases(self) -> dict[str, str]:
        """Tags of releases: the first digits of the id, and the commit."""
        found = ((_RELEASE_REF.fullmatch(tag), commit) for tag, commit in self.tags.items())
        return {match[1]: commit for match, commit in found if match}


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a blob is: a file of a commit."""

    commit: str
    path: str
    size_bytes: int
    is_large: bool


@dataclass
class _Known:
    """What cannot change, by commit: read once."""

    trees: dict[tuple[str, str], dict[str, RepoFile]] = field(default_factory=dict)
    documents: dict[tuple[str, str, str], bytes] = field(default_factory=dict)


class HuggingFaceStore:
    """A registry on the Hub; see the module."""

    def __init__(
        self, name: str, registry: Registry, *, deadline_s: float = transfer.DEADLINE_S
    ) -> None:
        """
        Open the registry `name`; nothing is asked yet.

        Args:
            name: Its key in params.yaml.
            registry: `hf:owner`, and `endpoint` of a mirror.
            deadline_s: See `transfer.retrying`.

        Raises:
            ParamsError: Plain HTTP to another machine, which is not declared.
        """
        self.name = name
        self._owner = registry.url.removeprefix("hf:")
        self._private = registry.private
        self._declared_endpoint = registry.endpoint
        limit_mib = registry.max_file_mib
        self._max_file_bytes = min(MAX_FILE_BYTES, (limit_mib or MAX_FILE_BYTES) * _MIB)
        self._hub = Hub.of(name, registry, deadline_s)
        self._known = _Known()
        # Branches and tags as they were last seen, and when (monotonic).
        self._seen: dict[str, tuple[float, _Refs]] = {}
        # What the next release is made of, by model and sha256: the Hub has no place for a small
        # file that no commit names.
        self._staged: dict[str, dict[str, Blob]] = {}

    @property
    def shown(self) -> str:
        """Its address as people may see it."""
        at = f" at {self._hub.endpoint}" if self._declared_endpoint else ""
        return console.clean(f"hf:{self._owner}{at}")

    @property
    def guarantees(self) -> Guarantees:
        """What it promises."""
        return Guarantees(
            compare_and_set=True,
            immutable=False,
            proves=False,
            max_file_bytes=self._max_file_bytes,
            sentence="For a large file just sent the Hub's word for its sha256 is taken, and "
            "everything is hashed when it is read; whoever may write can move a tag; a collection "
            "removes tags and branches, while files stay in the history and count as storage.",
        )

    def prepare(self, model: str) -> None:
        """
        Find out whether the repository can be written to, or the owner lets us make it.

        Raises:
            StoreError: No token, no right to write, gated, disabled.
            RetryLaterError: The Hub cannot be reached.
        """
        repo = self._repo(model)
        try:
            found = self._ask(model, "its settings", lambda: self._hub.api.model_info(repo))
        except NotThereError:
            self._require_owner(model)
            return
        self._ask(model, "the right to write", lambda: self._hub.api.auth_check(repo, write=True))
        if found.id != repo:
            raise StoreError(
                f"hf:{repo} answers as {wording.quoted(str(found.id))}: it was renamed.",
                hint=f"Declare its new owner as registries.{self.name}.url, or rename it back.",
            )
        if bool(found.private) != self._private:
            now, wanted = _visibility(bool(found.private)), _visibility(self._private)
            console.warn(
                f"hf:{repo} is {now}, and registries.{self.name} declares {wanted} for new "
                f"repositories. It stays {now}: its settings page changes that."
            )

    def _require_owner(self, model: str) -> None:
        """Refuse a token that may not make the repository, before anything is sent."""

        def call() -> list[str]:
            who = self._hub.api.whoami()
            return [who["name"], *(each["name"] for each in who.get("orgs", []))]

        names = self._ask(model, "whose the token is", call)
        if self._owner not in names:
            raise StoreError(
                f"hf:{self._repo(model)} does not exist, and the token is of "
                f"{wording.quoted(str(names[0]))}, who is not in {self._owner}.",
                hint="Use a token of a member who may create repositories there, or make the "
                "repository by hand once.",
            )

    # blobs

    def blob_size(self, model: str, sha256: str) -> int | None:
        """
        Return the size in bytes of a blob that a release holds, or that waits for the next one.

        What only waits here (see `put_blob`) is known to this object alone.
        """
        place = self._find(model, sha256)
        if place is not None:
            return place.size_bytes
        waiting = self._staged.get(model, {}).get(sha256)
        return waiting.size_bytes if waiting else None

    def put_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """
        Send a large file to the repository's storage, unless it is there; keep a small one ready.

        What the next release is made of gets there with its commit. A large file that a killed
        publisher has sent is not sent again; one that it was sending is sent from its beginning.

        Returns:
            Bytes that were sent; 0 if they were there.

        Raises:
            DigestError: The source is not the bytes that its name says. Nothing has that name.
            StoreError: It is larger than the Hub takes, or the Hub refused it.
        """
        _require_sha256(blob.sha256)
        self._require_size(blob)
        place = self._find(model, blob.sha256)
        waiting = self._staged.setdefault(model, {})
        if place is not None or blob.sha256 in waiting:
            on_bytes(blob.size_bytes)
            return 0
        self._make_repo(model)
        if isinstance(blob.source, bytes):
            _read_through(blob, on_bytes)
            waiting[blob.sha256] = blob
            return blob.size_bytes
        sent_bytes = self._send(model, blob, on_bytes)
        waiting[blob.sha256] = blob
        return sent_bytes

    def _send(self, model: str, blob: Blob, on_bytes: OnBytes) -> int:
        """Send a file if the Hub keeps such files in LFS; hash it here if not."""
        sent_bytes = 0

        def call() -> Addition:
            nonlocal sent_bytes
            addition = Addition(_by_name(blob.name) or f"{_BLOBS}{blob.sha256}", blob, on_bytes)
            try:
                self._hub.api.preupload_lfs_files(self._repo(model), [addition], free_memory=False)
            finally:
                sent_bytes = max(sent_bytes, addition.reader.sent_bytes)
                addition.reader.close()
            return addition

        addition = self._ask(model, f"sending {blob.name}", call, large=True)
        if addition.is_large:
            on_bytes(blob.size_bytes)
            return sent_bytes
        _read_through(blob, on_bytes)
        return blob.size_bytes

    def read_blob(self, model: str, sha256: str, *, offset: int = 0) -> Iterator[bytes]:
        """
        Yield the bytes of a blob of a release, as the Hub gives them.

        Raises:
            NotThereError: No release holds it.
        """
        place = self._find(model, sha256)
        if place is None:
            raise self._no_blob(model, sha256)
        yield from self._hub.stream(
            self._what(model, place.path), self._url(model, place.commit, place.path), offset
        )

    def prove_blob(self, model: str, blob: Blob, on_bytes: OnBytes) -> None:
        """
        Re-read a blob that a release holds, and hash it.

        What waits for the next release cannot be read yet. It was hashed while it was sent, and
        `put_release` holds the Hub's listing of the commit against it, before there is a tag.

        Raises:
            DigestError: The Hub has other bytes under that name.
            NotThereError: It has none.
        """
        place = self._find(model, blob.sha256)
        if place is None:
            if blob.sha256 not in self._staged.get(model, {}):
                raise self._no_blob(model, blob.sha256)
            on_bytes(blob.size_bytes)
            return
        found, size_bytes = hash_blob(
            self.read_blob(model, blob.sha256), on_bytes, most_bytes=blob.size_bytes
        )
        if (found, size_bytes) != (blob.sha256, blob.size_bytes):
            raise self._other_bytes(model, place.path, blob.sha256, found, size_bytes)

    def list_blobs(self) -> Iterator[StoredBlob]:
        """
        Yield every blob that a release holds, of all models.

        Others cannot be seen: files that were sent and no commit names, and those of releases that
        were removed, which stay in the history.
        """
        seen: set[str] = set()
        for model in self.list_models():
            refs = self._refs(model)
            for commit in refs.releases.values():
                for sha256, place in self._places(model, commit).items():
                    if sha256 not in seen:
                        seen.add(sha256)
                        yield StoredBlob(sha256=sha256, size_bytes=place.size_bytes, age_s=None)

    def delete_blob(self, sha256: str) -> None:
        """
        Forget a blob that waits for a release; the Hub removes no file from its history.

        Raises:
            StoreError: A release holds it.
        """
        for model in self.list_models():
            if self._find(model, sha256) is not None:
                raise StoreError(
                    f"hf:{self._repo(model)}: a release holds sha256:{sha256}; the Hub keeps files "
                    "in the history of a repository.",
                    hint="Remove the release first. Its page (Settings, Storage) frees the space.",
                )
        for waiting in self._staged.values():
            waiting.pop(sha256, None)

    # releases

    def put_release(self, release: Release, data: bytes) -> None:
        """
        Make a release: a branch with one commit, looked at, then the tag that readers know it by.

        Raises:
            StoreError: Other bytes are there under that id; or the Hub says of a file that it is
                another one, and there is no tag then.
            NotThereError: A file of it is neither there nor waiting.
        """
        model, id_ = release.model, release_id(data)
        self._make_repo(model)
        for _ in range(_MAX_ROUNDS):
            refs = self._refs(model)
            tagged = refs.releases.get(id_[:SHORT_CHARACTERS])
            if tagged is not None:
                self._require_same(model, id_, tagged, data)
                break
            # Another publisher of the same release is one reason, our own lost answer another.
            with contextlib.suppress(ConflictError):
                commit = self._branched(release, data, refs)
                self._require_whole(model, commit, release, data)
                self._tag(model, _ref(id_), commit)
        else:
            raise StoreError(
                f"hf:{self._repo(model)}: others write to {_ref(id_)} all the time.",
                hint="Find out who else publishes there, then try again.",
            )
        waiting = self._staged.get(model, {})
        for file in release.files:
            waiting.pop(file.sha256, None)

    def read_release(self, model: str, id_: str) -> bytes:
        """
        Return the stored bytes of a release.

        Raises:
            NotThereError: There is no such release.
        """
        _require_sha256(id_)
        commit = self._refs(model).releases.get(id_[:SHORT_CHARACTERS])
        if commit is None:
            raise NotThereError(
                f"{self.shown} has no release {short(id_)} of {model}.",
                hint=f"`fleet releases {model} --registry {self.name}` lists those it has.",
            )
        data = self._document(model, commit, _RELEASE_FILE)
        if data is None:
            raise self._damaged(model, id_, f"it has no {_RELEASE_FILE}")
        return data

    def list_releases(self, model: str) -> tuple[str, ...]:
        """
        Return the ids of the releases of a model: of the tags, each by its release.json.

        Raises:
            StoreError: A tag does not hold the release that it is named after.
        """
        found = []
        for digits, commit in self._refs(model).releases.items():
            data = self._document(model, commit, _RELEASE_FILE)
            id_ = release_id(data) if data is not None else "nothing"
            if not id_.startswith(digits):
                raise self._damaged(model, digits, f"its {_RELEASE_FILE} is that of {short(id_)}")
            found.append(id_)
        return tuple(found)

    def list_models(self) -> tuple[str, ...]:
        """Return the models of which it holds releases."""
        repos = self._hub.ask(
            f"{self.shown}: its repositories",
            lambda: [info.id for info in self._hub.api.list_models(author=self._owner)],
        )
        models = [
            repo.removeprefix(f"{self._owner}/").removesuffix(_SUFFIX)
            for repo in repos
            if repo.startswith(f"{self._owner}/") and repo.endswith(_SUFFIX)
        ]
        return tuple(sorted(each for each in models if self._refs(each).releases))

    def delete_release(self, model: str, id_: str) -> None:
        """Remove tag and branch of a release, if they are there; its files stay in the history."""
        _require_sha256(id_)
        ref, repo = _ref(id_), self._repo(model)
        refs = self._refs(model)
        tagged = refs.tags.get(ref)
        if tagged is not None:
            data = self._document(model, tagged, _RELEASE_FILE)
            if data is not None and release_id(data) != id_:
                return
            self._gone(
                model, f"removing tag {ref}", lambda: self._hub.api.delete_tag(repo, tag=ref)
            )
        if ref in refs.branches:
            self._gone(
                model,
                f"removing branch {ref}",
                lambda: self._hub.api.delete_branch(repo, branch=ref),
            )

    def release_age_s(self, model: str, id_: str) -> float | None:
        """Seconds since the commit of a release was made; None if it is not there."""
        commit = self._refs(model).releases.get(id_[:SHORT_CHARACTERS])
        if commit is None:
            return None
        found = self._ask(
            model,
            f"the age of release {short(id_)}",
            lambda: self._hub.api.get_paths_info(
                self._repo(model), [_RELEASE_FILE], revision=commit, expand=True
            ),
        )
        last = getattr(found[0], "last_commit", None) if found else None
        return max(0.0, (datetime.now(UTC) - last.date).total_seconds()) if last else None

    # aliases

    def read_alias(self, model: str, alias: str) -> tuple[Alias | None, Token]:
        """Return an alias and the commit that main means; (None, commit) if there is none."""
        head = self._refs(model).head
        path = _alias_path(alias)
        data = self._document(model, head, path) if head is not None else None
        if data is None:
            return None, head
        found = parse_alias(data, f"hf:{self._repo(model)}, {path},")
        if (found.model, found.alias) != (model, alias):
            raise StoreError(
                f"hf:{self._repo(model)}, {path}, is the alias {console.clean(found.model)}@"
                f"{console.clean(found.alias)}.",
                hint="Somebody copied it there. `fleet audit` compares it with the ledger in git.",
            )
        return found, head

    def write_alias(self, alias: Alias, release: Release, expected: Token) -> None:
        """
        Move an alias, and with it main: one commit after the one that was read.

        Raises:
            AliasMovedError: Somebody committed to main since.
            StoreError: The Hub says that a file of the release is another one; nothing was moved.
        """
        model = alias.model
        data = release_bytes(release)
        refs = self._refs(model)
        tagged = refs.releases.get(alias.release[:SHORT_CHARACTERS])
        if tagged is None or release_id(data) != alias.release:
            raise NotThereError(
                f"{self.shown} has no release {short(alias.release)} of {model} that "
                f"{alias.alias} could mean.",
                hint=f"fleet publish {model} --to {self.name}",
            )
        self._require_whole(model, tagged, release, data)
        written = alias_bytes(alias)
        path = _alias_path(alias.alias)
        if refs.head != expected:
            if refs.head is None or self._document(model, refs.head, path) != written:
                raise self._moved(alias)
            return
        operations = [
            *self._moves(release, tagged, expected),
            _addition(path, written),
        ]
        move = alias.moves[-1]
        title = f"{alias.alias}: release {short(alias.release)} (move {move.sequence})"
        try:
            self._commit(model, _MAIN, operations, title, expected)
        except ConflictError as error:
            head = self._refs(model).head
            if head is None or self._document(model, head, path) != written:
                raise self._moved(alias) from error

    def _moves(self, release: Release, tagged: str, expected: str) -> Iterator[Operation]:
        """Yield what makes main hold a release: copies of the large files, the small ones anew."""
        model = release.model
        there = self._tree(model, expected)
        wanted = self._tree(model, tagged)
        paths = [*_layout(release), _RELEASE_FILE, *([_CARD_FILE] if _CARD_FILE in wanted else [])]
        for path in paths:
            if path in there and there[path].blob_id == wanted[path].blob_id:
                continue
            if wanted[path].lfs:
                yield CommitOperationCopy(path, path, src_revision=tagged)
            else:
                yield _addition(path, self._bytes(model, tagged, path))
        yield from self._leftovers(model, expected, set(paths))

    def _leftovers(self, model: str, commit: str, wanted: set[str]) -> Iterator[Operation]:
        """
        Yield the removal of what the release before put there, and this one does not have.

        What we did not put there stays, and so does what somebody changed since.
        """
        before = self._release_at(model, commit)
        if before is None:
            return
        tree = self._tree(model, commit)
        for path, file in _layout(before).items():
            if path in wanted or path not in tree:
                continue
            if self._is(model, commit, path, file):
                yield CommitOperationDelete(path, is_folder=False)

    # what a release is made of

    def _branched(self, release: Release, data: bytes, refs: _Refs) -> str:
        """Return the commit of a release's branch that holds all of it; make what is missing."""
        model, ref = release.model, _ref(release_id(data))
        base = refs.branches.get(ref)
        if base is None:
            base = refs.head
            if base is None:
                raise StoreError(
                    f"hf:{self._repo(model)} has no commit on {_MAIN}.",
                    hint="Make one on its page: any file will do.",
                )
            start = base
            self._ask(
                model,
                f"making branch {ref}",
                lambda: self._hub.api.create_branch(self._repo(model), branch=ref, revision=start),
            )
        elif self._holds(model, base, release, data):
            return base
        operations = list(self._contents(release, data, refs, base))
        title = f"release {short(release_id(data))} of {model}"
        return self._commit(model, ref, operations, title, base)

    def _contents(
        self, release: Release, data: bytes, refs: _Refs, base: str
    ) -> Iterator[Operation]:
        """Yield every file of a release, and the removal of what another one left in the branch."""
        model = release.model
        waiting = self._staged.get(model, {})
        layout = _layout(release)
        for path, file in layout.items():
            if file.sha256 in waiting:
                yield Addition(path, waiting[file.sha256])
                continue
            place = self._find(model, file.sha256, refs)
            if place is None:
                raise self._no_blob(model, file.sha256, file.name)
            if place.is_large:
                yield CommitOperationCopy(place.path, path, src_revision=place.commit)
            else:
                yield _addition(path, self._bytes(model, place.commit, place.path))
        card = model_card.render(release, release_id(data), self._repo(model))
        yield _addition(_CARD_FILE, card.encode())
        yield _addition(_RELEASE_FILE, data)
        yield from self._leftovers(model, base, set(layout))
        for path in self._tree(model, base):
            # Of main, from where the branch starts: the alias means nothing in a release.
            if path.startswith(_ALIASES):
                yield CommitOperationDelete(path, is_folder=False)

    def _commit(
        self, model: str, branch: str, operations: Iterable[Operation], title: str, parent: str
    ) -> str:
        """
        Make one commit after `parent`; return its id.

        Raises:
            ConflictError: The branch has moved. Perhaps by this very commit, if its answer was
                lost: the caller looks.
        """
        repo = self._repo(model)

        def call() -> str:
            # Made anew for each attempt: the library marks what it has sent.
            fresh = [
                Addition(each.path_in_repo, each.blob) if isinstance(each, Addition) else each
                for each in operations
            ]
            additions = [each for each in fresh if isinstance(each, Addition)]
            try:
                api = self._hub.api
                api.preupload_lfs_files(repo, additions, revision=branch, free_memory=False)
                ignored = [each.path_in_repo for each in additions if each.is_ignored]
                if ignored:
                    raise StoreError(
                        f"hf:{repo}: its .gitignore keeps out {wording.first_few(ignored)}. "
                        "Nothing was committed.",
                        hint="Remove those rules from the .gitignore of the repository.",
                    )
                info = api.create_commit(
                    repo,
                    fresh,
                    commit_message=title,
                    revision=branch,
                    parent_commit=parent,
                )
            finally:
                for each in additions:
                    each.reader.close()
            return info.oid

        self._seen.pop(model, None)
        return self._ask(model, f"committing to {branch}", call, large=True)

    def _tag(self, model: str, ref: str, commit: str) -> None:
        """Give a commit its tag: from here on readers know the release."""
        self._ask(
            model,
            f"tagging {ref}",
            lambda: self._hub.api.create_tag(self._repo(model), tag=ref, revision=commit),
        )
        self._seen.pop(model, None)

    def _require_same(self, model: str, id_: str, commit: str, data: bytes) -> None:
        """
        Refuse to put a release where another one is.

        Raises:
            StoreError: Other bytes are there under that id, or a file of it is another one.
        """
        if self._document(model, commit, _RELEASE_FILE) != data:
            raise self._damaged(model, id_, f"its {_RELEASE_FILE} is another one")
        self._require_whole(model, commit, Release.model_validate_json(data), data)

    def _require_whole(self, model: str, commit: str, release: Release, data: bytes) -> None:
        """
        Hold every file of a commit against a release.

        Raises:
            StoreError: One is missing, or the Hub says that it is another one.
        """
        problem = next(self._problems(model, commit, release, data), None)
        if problem is not None:
            raise StoreError(
                f"hf:{self._repo(model)}, release {short(release_id(data))}: {problem}. No alias "
                "was moved.",
                hint=f"Remove tag and branch {_ref(release_id(data))} on its page and publish "
                "again; if it stays so, what is between, or the Hub, changes files.",
            )

    def _holds(self, model: str, commit: str, release: Release, data: bytes) -> bool:
        """Tell whether a commit holds a whole release."""
        return next(self._problems(model, commit, release, data), None) is None

    def _problems(self, model: str, commit: str, release: Release, data: bytes) -> Iterator[str]:
        """Say what of a release a commit lacks or has otherwise."""
        if self._document(model, commit, _RELEASE_FILE) != data:
            yield f"{_RELEASE_FILE} is another one"
        tree = self._tree(model, commit)
        for path, file in _layout(release).items():
            if path not in tree:
                yield f"{file.name} is missing"
            elif tree[path].size != file.size_bytes:
                yield f"{file.name} has {tree[path].size} bytes, not {file.size_bytes}"
            elif not self._is(model, commit, path, file):
                yield f"{file.name} is not sha256:{file.sha256}"

    def _is(self, model: str, commit: str, path: str, file: ReleaseFile) -> bool:
        """Tell whether a file of a commit is that of a release: by the listing, or by its bytes."""
        listed = self._tree(model, commit)[path]
        if listed.lfs:
            return (listed.lfs.sha256, listed.size) == (file.sha256, file.size_bytes)
        return hashlib.sha256(self._bytes(model, commit, path)).hexdigest() == file.sha256

    # where things are

    def _find(self, model: str, sha256: str, refs: _Refs | None = None) -> _Place | None:
        """Find a blob in the releases, then in main, which may mean one that was removed."""
        _require_sha256(sha256)
        refs = refs or self._recent_refs(model)
        for commit in (*refs.releases.values(), *([refs.head] if refs.head else [])):
            place = self._places(model, commit).get(sha256)
            if place is not None:
                return place
        return None

    def _places(self, model: str, commit: str) -> dict[str, _Place]:
        """Return the files of a commit by sha256, as far as a release or the listing tells it."""
        tree = self._tree(model, commit)
        release = self._release_at(model, commit)
        named = {file.sha256: path for path, file in _layout(release).items()} if release else {}
        found: dict[str, str] = {
            listed.lfs.sha256: path for path, listed in tree.items() if listed.lfs
        }
        found |= {
            sha256: path for sha256, path in named.items() if path in tree and not tree[path].lfs
        }
        return {
            sha256: _Place(
                commit=commit,
                path=path,
                size_bytes=tree[path].size,
                is_large=tree[path].lfs is not None,
            )
            for sha256, path in found.items()
        }

    def _release_at(self, model: str, commit: str) -> Release | None:
        """Read the release of a commit; None if it holds none that we can read."""
        data = self._document(model, commit, _RELEASE_FILE)
        try:
            return Release.model_validate_json(data) if data is not None else None
        except ValidationError:
            return None

    def _refs(self, model: str) -> _Refs:
        """
        Ask where branches and tags are now; none of a repository that does not exist.

        Raises:
            NotThereError: It does not exist for us, who have no token: it may well be private.
        """

        def call() -> _Refs:
            found = self._hub.api.list_repo_refs(self._repo(model))
            return _Refs(_commits(found.branches), _commits(found.tags))

        try:
            refs = self._ask(model, "its branches", call)
        except NotThereError:
            if self._hub.is_anonymous:
                raise
            refs = _Refs({}, {})
        self._seen[model] = (time.monotonic(), refs)
        return refs

    def _recent_refs(self, model: str) -> _Refs:
        """Return branches and tags as they were a moment ago, or ask."""
        at, refs = self._seen.get(model, (float("-inf"), None))
        if refs is None or time.monotonic() - at > _REFS_SERVE_S:
            return self._refs(model)
        return refs

    def _tree(self, model: str, commit: str) -> dict[str, RepoFile]:
        """List the files of a commit."""
        key = (model, commit)
        if key not in self._known.trees:

            def call() -> dict[str, RepoFile]:
                listed = self._hub.api.list_repo_tree(
                    self._repo(model), revision=commit, recursive=True
                )
                return {each.path: _file(each) for each in listed if isinstance(each, RepoFile)}

            self._known.trees[key] = self._ask(model, "its files", call)
        return self._known.trees[key]

    def _document(self, model: str, commit: str, path: str) -> bytes | None:
        """Read a small file of a commit; None if the commit has none."""
        return self._bytes(model, commit, path) if path in self._tree(model, commit) else None

    def _bytes(self, model: str, commit: str, path: str) -> bytes:
        """Read a small file that a commit lists, and hold it against the listing."""
        key = (model, commit, path)
        if key not in self._known.documents:
            listed = self._tree(model, commit)[path]
            what = self._what(model, path)
            if listed.size > _MAX_DOCUMENT_BYTES:
                raise StoreError(f"{what} is larger than any such file: it was not read.")
            data = b""
            for chunk in self._hub.stream(what, self._url(model, commit, path), 0):
                data += chunk
                if len(data) > listed.size:
                    break
            if not _is_listed(data, listed):
                raise StoreError(
                    f"{what} is not what the Hub lists for it ({len(data)} bytes, {listed.size} "
                    "were listed). Nothing of it was used.",
                    hint="A proxy or a mirror may have changed it; try again.",
                )
            self._known.documents[key] = data
        return self._known.documents[key]

    def _make_repo(self, model: str) -> None:
        """Make the repository if it does not exist; one that does stays as it is."""
        if self._recent_refs(model).head is not None:
            return
        self._seen.pop(model, None)
        repo = self._repo(model)
        # Somebody who publishes at the same time may be faster.
        with contextlib.suppress(ConflictError):
            self._ask(
                model, "making it", lambda: self._hub.api.create_repo(repo, private=self._private)
            )

    def _gone(self, model: str, what: str, call: Callable[[], None]) -> None:
        """Remove something; it may be gone already."""
        self._seen.pop(model, None)
        with contextlib.suppress(NotThereError):
            self._ask(model, what, call)

    # words and names

    def _ask(self, model: str, what: str, call: Callable[[], T], *, large: bool = False) -> T:
        return self._hub.ask(self._what(model, what), call, large=large)

    def _what(self, model: str, what: str) -> str:
        return f"hf:{self._repo(model)}: {console.clean(what)}"

    def _repo(self, model: str) -> str:
        if not _SEGMENT.fullmatch(model):
            raise StoreError(f"{wording.quoted(model)} cannot be the name of a model.")
        return f"{self._owner}/{model}{_SUFFIX}"

    def _url(self, model: str, commit: str, path: str) -> str:
        return hf_hub_url(self._repo(model), path, revision=commit, endpoint=self._hub.endpoint)

    def _require_size(self, blob: Blob) -> None:
        if blob.size_bytes > self._max_file_bytes:
            raise StoreError(
                f"{blob.name} has {wording.mib(blob.size_bytes / _MIB)}; {self.shown} takes files "
                f"up to {wording.mib(self._max_file_bytes / _MIB)}. Nothing of it was sent.",
                hint="Remove that quant from params.yaml, or publish to another registry.",
            )

    def _no_blob(self, model: str, sha256: str, name: str = "") -> NotThereError:
        of = f"{name}, " if name else ""
        return NotThereError(
            f"hf:{self._repo(model)} has no {of}sha256:{sha256} in any release.",
            hint=f"`fleet verify-registry {self.name}` names everything that is missing.",
        )

    def _other_bytes(
        self, model: str, path: str, sha256: str, found: str, size_bytes: int
    ) -> DigestError:
        return DigestError(
            f"hf:{self._repo(model)} holds other bytes for {console.clean(path)}: sha256:{sha256} "
            f"was stored, {found} ({size_bytes} bytes) is there.",
            hint=f"`fleet verify-registry {self.name}` names everything else that is not what it "
            "should be.",
        )

    def _damaged(self, model: str, id_: str, why: str) -> StoreError:
        return StoreError(
            f"hf:{self._repo(model)}, tag {_ref(id_)}: {why}; nothing was overwritten.",
            hint="Somebody moved that tag. Remove it and its branch on the page of the repository, "
            "then publish again.",
        )

    def _moved(self, alias: Alias) -> AliasMovedError:
        return AliasMovedError(
            f"{_MAIN} of hf:{self._repo(alias.model)} was committed to by somebody else, so "
            f"{alias.alias} was not moved."
        )


# --- names and bytes --------------------------------------------------------------------------


def _layout(release: Release) -> dict[str, ReleaseFile]:
    """Return the files of a release by their paths in a repository."""
    found = {_path(file): file for file in release.files}
    layers = release.of("ollama-layer")
    for kind in _OLLAMA_FILES:
        same = {file.sha256: file for file in layers if file.media_type.endswith(f".image.{kind}")}
        # One for the whole repository: where quants differ, none would be right.
        if len(same) == 1:
            found[kind] = next(iter(same.values()))
    return found


def _path(file: ReleaseFile) -> str:
    name = _by_name(file.name) if file.role in _BY_NAME else None
    return name or f"{_BLOBS}{file.sha256}"


def _by_name(name: str) -> str | None:
    """Return a name that can be one of a repository's own; None if it means something there."""
    return None if name.lower() in _RESERVED or not _SEGMENT.fullmatch(name) else name


def _alias_path(alias: str) -> str:
    if not _SEGMENT.fullmatch(alias):
        raise StoreError(f"{wording.quoted(alias)} cannot be the name of an alias.")
    return f"{_ALIASES}{alias}.json"


def _ref(id_: str) -> str:
    return f"release-{id_[:SHORT_CHARACTERS]}"


def _require_sha256(text: str) -> None:
    if not _SHA256.fullmatch(text):
        raise StoreError(f"{wording.quoted(text)} is no sha256.")


def _commits(refs: Iterable[GitRefInfo]) -> dict[str, str]:
    """
    Return the commits of branches or tags by name.

    Raises:
        ValueError: One of them is none.
    """
    found = {ref.name: ref.target_commit for ref in refs}
    for name, commit in found.items():
        if not (isinstance(name, str) and isinstance(commit, str) and _COMMIT.fullmatch(commit)):
            raise ValueError(f"{name!r} means {commit!r}, which is no commit")
    return found


def _file(listed: RepoFile) -> RepoFile:
    """
    Return an entry of a listing whose fields are what we compare with.

    Raises:
        ValueError: They are not.
    """
    sizes = [listed.size, *([listed.lfs.size] if listed.lfs else [])]
    texts = [listed.path, listed.blob_id, *([listed.lfs.sha256] if listed.lfs else [])]
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or not all(
        isinstance(text, str) for text in texts
    ):
        raise ValueError(f"{listed.path!r} is listed without a size or a digest")
    return listed


def _visibility(private: bool) -> str:  # noqa: FBT001 - the Hub's own word
    return "private" if private else "public"


def _addition(path: str, data: bytes) -> Addition:
    """Add bytes that we have."""
    return Addition(
        path,
        Blob(
            name=path,
            sha256=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
            media_type="application/octet-stream",
            source=data,
        ),
    )


def _is_listed(data: bytes, listed: RepoFile) -> bool:
    """Compare bytes with the Hub's own listing: an LFS digest, or git's blob id."""
    if listed.lfs:
        return hashlib.sha256(data).hexdigest() == listed.lfs.sha256
    blob = b"blob %d\0" % len(data) + data
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == listed.blob_id


def _read_through(blob: Blob, on_bytes: OnBytes) -> None:
    """
    Hash a small source, which is sent with the commit.

    Raises:
        DigestError: It is not what its name says.
    """
    with Reader(blob, on_bytes) as reader:
        while reader.read(1 << 20):
            pass
        reader.require()
