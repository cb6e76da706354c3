"""
A stand-in for the Hugging Face Hub that can be written to, for huggingface_hub unmodified.

It keeps real bytes (large ones on disk), real commits with parents, branches and tags, and checks
what the Hub checks: the token and what it may do, the sha256 and size of an LFS object, that a
commit names only objects that are there, `parentCommit` against the head of the branch, the front
matter of a README. What it cannot show: the Hub's storage (xet), its rate limits, its permissions.

    with serve(tmp_path) as hub:
        hub.faults[7] = "cut"           # the eighth request from now on
        HuggingFaceStore("hub", Registry(url="hf:acme", endpoint=hub.url))
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import secrets
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WRITE_TOKEN = "hf_writeCanaryWriteCanary"
READ_TOKEN = "hf_readCanaryReadCanary"
JWT = "hf_jwt_exchangedCanary"
RUNNER_TOKEN = "runnerCanary"
# As the Hub does; a smaller one makes small test files large ones.
LFS_FROM_BYTES = 10_000_000
POINTER_BYTES = 134
CHUNK = 1 << 16

Fault = Literal[
    "500",  # and nothing was done
    "503",
    "429",  # with `retry_after`
    "401",  # the token has expired
    "403",
    "html",  # a proxy's page, status 200
    "cut",  # the connection ends before anything was done
    "lost",  # it was done, and the connection ends before the answer
    "late 500",  # it was done, and the answer is an error
]


@dataclass(frozen=True)
class Entry:
    """A file of a commit: content for a regular one, the digest of its object for one in LFS."""

    content: bytes | None
    oid: str | None
    size: int

    @property
    def git_oid(self) -> str:
        """Git's blob id: of the content, or of the pointer."""
        content = self.content
        if content is None:
            content = (
                "version https://git-lfs.github.com/spec/v1\n"
                f"oid sha256:{self.oid}\nsize {self.size}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A commit with its whole tree."""

    id: str
    parent: str | None
    title: str
    at: float
    tree: dict[str, Entry]


@dataclass
class Repo:
    """A repository of models."""

    id: str
    private: bool = True
    gated: bool = False
    disabled: bool = False
    gitignore: tuple[str, ...] = ()
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    # LFS objects that it has, by sha256.
    objects: set[str] = field(default_factory=set)

    def commit(self, tree: dict[str, Entry], parent: str | None, title: str) -> Commit:
        """Add a commit; no branch means it yet."""
        made = Commit(secrets.token_hex(20), parent, title, time.time(), dict(tree))
        self.commits[made.id] = made
        return made

    def at(self, revision: str) -> Commit | None:
        """Find a commit by branch, tag or id."""
        id_ = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(id_)

    @property
    def head(self) -> Commit:
        """What main means."""
        return self.commits[self.branches["main"]]


@dataclass(frozen=True)
class Asked:
    """One request: method, path without query, bytes of its body, status of the answer."""

    method: str
    path: str
    body_bytes: int
    status: int

    def __str__(self) -> str:
        """As a test shows it."""
        return f"{self.method} {self.path} ({self.body_bytes} bytes): {self.status}"


@dataclass
class Hub:
    """
    The state of the stand-in, which tests look at and break.

    Attributes:
        root: Directory of the LFS objects.
        lfs_from_bytes: Size from which a text is kept in LFS; what is no text always is.
        all_regular: Keep everything in git itself.
        part_bytes: Size from which an upload is in parts of that size; None means never.
        page: Entries on a page of a tree.
        expired: Tokens that are refused with 401 from now on.
        lies: sha256 that the listing tells instead of the stored one.
        swaps: LFS objects whose bytes are other ones, by sha256.
        faults: What goes wrong with the n-th request from `since`.
        since: Number of the request that counts as the first.
        before: Called with number, method and path before a request is handled.
        after: Called when it was handled, before the answer.
        served: LFS bytes that were sent to readers.
        received: LFS bytes that were received.
    """

    root: Path
    url: str = ""
    lfs_from_bytes: int = LFS_FROM_BYTES
    all_regular: bool = False
    part_bytes: int | None = None
    page: int = 1000
    retry_after: str = "1"
    repos: dict[str, Repo] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    lies: dict[str, str] = field(default_factory=dict)
    swaps: dict[str, bytes] = field(default_factory=dict)
    faults: dict[int, Fault] = field(default_factory=dict)
    since: int = 0
    before: Callable[[int, str, str], None] | None = None
    after: Callable[[int, str, str], None] | None = None
    asked: list[Asked] = field(default_factory=list)
    received: int = 0
    served: int = 0
    exchanged: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    count: int = 0

    def begin(self, **faults: Fault) -> None:
        """Count requests from here; `n3="cut"` breaks the fourth."""
        with self.lock:
            self.since = self.count
            self.asked.clear()
            self.faults = {int(key[1:]): fault for key, fault in faults.items()}

    def create(self, id_: str, *, private: bool = True) -> Repo:
        """Make a repository as the Hub does: with a first commit on main."""
        repo = Repo(id_, private=private)
        first = repo.commit({".gitattributes": regular(b"*.bin filter=lfs\n")}, None, "initial")
        repo.branches["main"] = first.id
        self.repos[id_] = repo
        return repo

    def object(self, oid: str) -> Path:
        """Where the bytes of an LFS object lie."""
        return self.root / oid

    def read(self, entry: Entry) -> bytes:
        """Return the bytes of a file as it would be served."""
        if entry.oid is None:
            return entry.content or b""
        if entry.oid in self.swaps:
            return self.swaps[entry.oid]
        return self.object(entry.oid).read_bytes()

    def file(self, repo: str, path: str, revision: str = "main") -> bytes:
        """Return the bytes of a file of a revision."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return self.read(commit.tree[path])

    def writes(self) -> list[Asked]:
        """What was asked that could change something."""
        return [each for each in self.asked if each.method not in {"GET", "HEAD"}]


def regular(content: bytes) -> Entry:
    """A file in git itself."""
    return Entry(content, None, len(content))


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve an empty Hub on a free port of loopback."""
    objects = root / "hub-objects"
    objects.mkdir(parents=True, exist_ok=True)
    hub = Hub(objects)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def handle_error(self, *_: Any) -> None:
        """A client that left is none of our business."""


class _AnswerError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code


class _Cut(Exception):  # noqa: N818 - no error: the fault that was asked for
    """Close the connection now."""


@dataclass
class _Reply:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> _Reply:
    body = json.dumps(value).encode()
    return _Reply(status, {"Content-Type": "application/json", **(headers or {})}, body)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(split.query).items()}
        # Not unquoted as a whole: a branch may hold an encoded slash.
        self.parts = [unquote(part) for part in split.path.split("/")[1:]]
        path = unquote(split.path)
        self.body_read = 0
        with self.hub.lock:
            number = self.hub.count - self.hub.since
            self.hub.count += 1
        if self.hub.before is not None:
            self.hub.before(number, self.command, path)
        fault = self.hub.faults.get(number)
        try:
            reply = self._faulty(fault) or self._answered()
            if self.hub.after is not None:
                self.hub.after(number, self.command, path)
            if fault == "lost":
                raise _Cut  # noqa: TRY301 - as if it had happened below
            if fault == "late 500":
                reply = _json({"error": "Internal Error"}, 500)
        except _Cut:
            self._note(path, 0)
            self.close_connection = True
            return
        self._drain()
        self._note(path, reply.status)
        with contextlib.suppress(OSError):
            self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _note(self, path: str, status: int) -> None:
        with self.hub.lock:
            self.hub.asked.append(Asked(self.command, path, self.body_read, status))

    def _answered(self) -> _Reply:
        try:
            return self._routed()
        except _AnswerError as error:
            return _json({"error": error.message}, error.status, error.headers)

    def _faulty(self, fault: Fault | None) -> _Reply | None:
        match fault:
            case "500" | "503":
                return _json({"error": "Internal Error"}, int(fault))
            case "429":
                headers = {"Retry-After": self.hub.retry_after}
                return _json({"error": "Too many requests"}, 429, headers)
            case "401":
                return _json({"error": "Invalid credentials in Authorization header"}, 401)
            case "403":
                # What was shown is told again, as careless servers do; storage says nothing.
                shown = self.headers.get("Authorization")
                return _json({"error": f"{shown} may not do this"} if shown else {}, 403)
            case "html":
                page = b"<html><body>Sign in to the network</body></html>"
                return _Reply(200, {"Content-Type": "text/html"}, page)
            case "cut":
                raise _Cut
            case _:
                return None

    def _send(self, reply: _Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    # bodies

    @property
    def _length(self) -> int:
        return int(self.headers.get("Content-Length", "0"))

    def _chunks(self) -> Iterator[bytes]:
        while self.body_read < self._length:
            chunk = self.rfile.read(min(CHUNK, self._length - self.body_read))
            if not chunk:
                raise _Cut
            self.body_read += len(chunk)
            yield chunk

    def _drain(self) -> None:
        """Read what was not looked at, so that the next request of the connection is one."""
        with contextlib.suppress(_Cut, OSError):
            for _ in self._chunks():
                pass

    def _body(self) -> bytes:
        return b"".join(self._chunks())

    def _body_json(self) -> Any:
        return json.loads(self._body() or b"{}")

    # who

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        known = {WRITE_TOKEN, READ_TOKEN, *([JWT] if self.hub.exchanged else [])}
        if scheme != "Bearer" or token not in known or token in self.hub.expired:
            message = "Invalid credentials in Authorization header"
            raise _AnswerError(401, message, X_Error_Message=message)
        return token

    def _writer(self) -> None:
        token = self._token()
        if token is None:
            raise _AnswerError(401, "Unauthorized")
        if token == READ_TOKEN:
            message = "Forbidden: you must use a write token"
            raise _AnswerError(403, message, X_Error_Message=message)

    def _repo(self, owner: str, name: str, *, write: bool = False) -> Repo:
        token = self._token()
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and token is None):
            raise _AnswerError(404 if token else 401, "Repository not found", "RepoNotFound")
        if repo.disabled:
            message = "Access to this resource is disabled."
            raise _AnswerError(403, message, X_Error_Message=message)
        if write:
            self._writer()
        return repo

    @staticmethod
    def _at(repo: Repo, revision: str) -> Commit:
        found = repo.at(revision)
        if found is None:
            raise _AnswerError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # what is asked

    def _routed(self) -> _Reply:  # noqa: C901, PLR0911, PLR0912 - one line for each call
        match self.command, self.parts:
            case "POST", ["oauth", "token"]:
                return self._oauth()
            case "GET", ["oidc", "mint"]:
                return self._mint()
            case "GET", ["api", "whoami-v2"]:
                if self._token() is None:
                    raise _AnswerError(401, "Unauthorized")
                return _json({"type": "user", "name": "acme", "orgs": []})
            case "POST", ["api", "validate-yaml"]:
                return self._validate_yaml()
            case "POST", ["api", "repos", "create"]:
                return self._create_repo()
            case "GET", ["api", "models"]:
                return self._list_models()
            case "PUT", ["lfs", oid]:
                return self._put_object(oid)
            case "PUT", ["lfs", oid, "part", number]:
                return self._put_part(oid, int(number))
            case "POST", ["lfs", oid, "complete"]:
                return self._complete(oid)
            case (("GET" | "HEAD"), ["cdn", oid]):
                return self._cdn(oid)
            case "POST", [owner, git, "info", "lfs", "objects", "batch"]:
                return self._batch(self._repo(owner, git.removesuffix(".git"), write=True))
            case "POST", [owner, git, "info", "lfs", "objects", "verify"]:
                return self._verify(self._repo(owner, git.removesuffix(".git"), write=True))
            case (("GET" | "HEAD"), [owner, name, "resolve", revision, *path]):
                return self._resolve(self._repo(owner, name), revision, "/".join(path))
            case _, ["api", "models", owner, name, *rest]:
                write = self.command != "GET" and rest[:1] != ["paths-info"]
                return self._model(self._repo(owner, name, write=write), rest)
            case _:
                raise _AnswerError(404, f"nobody listens to {self.command} {self.path}")

    def _model(self, repo: Repo, rest: list[str]) -> _Reply:  # noqa: C901, PLR0911 - one for each call
        match self.command, rest:
            case "GET", []:
                return _json(self._info(repo, repo.head))
            case "GET", ["revision", revision]:
                return _json(self._info(repo, self._at(repo, revision)))
            case "GET", ["auth-check", *write]:
                if write:
                    self._writer()
                return _json({})
            case "GET", ["refs"]:
                return self._refs(repo)
            case "GET", ["tree", revision]:
                return self._tree(repo, revision)
            case "POST", ["paths-info", revision]:
                return self._paths_info(repo, revision)
            case "POST", ["preupload", revision]:
                return self._preupload(repo, revision)
            case "POST", ["commit", revision]:
                with self.hub.lock:
                    return self._commit(repo, revision)
            case (("POST" | "DELETE"), ["branch", name]):
                with self.hub.lock:
                    return self._branch(repo, name)
            case (("POST" | "DELETE"), ["tag", name]):
                with self.hub.lock:
                    return self._tag(repo, name)
            case _:
                raise _AnswerError(404, f"nobody listens to {self.command} {self.path}")

    # accounts and repositories

    def _mint(self) -> _Reply:
        """As GitHub does for a job with `id-token: write`."""
        if self.headers.get("Authorization") != f"Bearer {RUNNER_TOKEN}":
            raise _AnswerError(401, "no such job")
        return _json({"value": f"jwt-for-{self.query['audience']}"})

    def _oauth(self) -> _Reply:
        asked = self._body_json()
        if asked["subject_token"] != f"jwt-for-{self.hub.url}":
            raise _AnswerError(400, "invalid_grant: the audience is not this Hub")
        self.hub.exchanged.append(asked)
        return _json({"access_token": JWT, "token_type": "bearer", "expires_in": 3600})

    def _create_repo(self) -> _Reply:
        self._writer()
        asked = self._body_json()
        id_ = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "acme":
            raise _AnswerError(403, "You don't have the rights to create a model under this name")
        with self.hub.lock:
            if id_ in self.hub.repos:
                raise _AnswerError(409, "You already created this model repo")
            self.hub.create(id_, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.hub.url}/{id_}", "name": id_})

    def _list_models(self) -> _Reply:
        token = self._token()
        author = self.query.get("author")
        shown = [
            self._info(repo, repo.head)
            for repo in self.hub.repos.values()
            if repo.id.split("/")[0] == author and (token or not repo.private)
        ]
        return _json(shown)

    def _info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        return {
            "_id": "1", "id": repo.id, "modelId": repo.id, "sha": commit.id, "tags": [],
            "private": repo.private, "gated": repo.gated and "manual", "disabled": False,
            "downloads": 0, "siblings": [{"rfilename": path} for path in commit.tree],
        }  # fmt: skip

    def _validate_yaml(self) -> _Reply:
        asked = self._body_json()
        problem = front_matter_problem(asked["content"])
        if problem:
            return _json({"errors": [{"message": problem}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    # refs and trees

    def _refs(self, repo: Repo) -> _Reply:
        def shown(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": id_}
                for name, id_ in refs.items()
            ]

        return _json({"branches": shown(repo.branches, "heads"), "converts": [],
                      "tags": shown(repo.tags, "tags")})  # fmt: skip

    def _branch(self, repo: Repo, name: str) -> _Reply:
        if self.command == "DELETE":
            if repo.branches.pop(name, None) is None:
                raise _AnswerError(404, "no such branch", "RevisionNotFound")
            return _json({})
        start = self._at(repo, self._body_json().get("startingPoint", "main"))
        if name in repo.branches:
            raise _AnswerError(409, "Reference already exists")
        repo.branches[name] = start.id
        return _json({})

    def _tag(self, repo: Repo, name: str) -> _Reply:
        if self.command == "DELETE":
            if repo.tags.pop(name, None) is None:
                raise _AnswerError(404, "no such tag", "RevisionNotFound")
            return _json({})
        tag = self._body_json()["tag"]
        commit = self._at(repo, name)
        if tag in repo.tags:
            raise _AnswerError(409, "Tag reference exists already")
        repo.tags[tag] = commit.id
        return _json({})

    def _tree(self, repo: Repo, revision: str) -> _Reply:
        commit = self._at(repo, revision)
        recursive = self.query.get("recursive", "").lower() == "true"
        found: list[dict[str, Any]] = []
        folders = {path.rpartition("/")[0] for path in commit.tree if "/" in path}
        found += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            for folder in sorted(folders)
        ]
        found += [
            self._listed(commit, path)
            for path in sorted(commit.tree)
            if recursive or "/" not in path
        ]
        cursor = int(self.query.get("cursor", "0"))
        page = found[cursor : cursor + self.hub.page]
        headers = {}
        if cursor + self.hub.page < len(found):
            following = f"{self.hub.url}{urlsplit(self.path).path}"
            headers["Link"] = (
                f'<{following}?recursive={recursive}&cursor={cursor + self.hub.page}>; rel="next"'
            )
        return _json(page, headers=headers)

    def _listed(self, commit: Commit, path: str, *, expand: bool = False) -> dict[str, Any]:
        entry = commit.tree[path]
        listed: dict[str, Any] = {"type": "file", "oid": entry.git_oid, "size": entry.size,
                                  "path": path}  # fmt: skip
        if entry.oid is not None:
            oid = self.hub.lies.get(entry.oid, entry.oid)
            listed["lfs"] = {"oid": oid, "size": entry.size, "pointerSize": POINTER_BYTES}
        if expand:
            at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(commit.at))
            listed["lastCommit"] = {"id": commit.id, "title": commit.title, "date": at}
        return listed

    def _paths_info(self, repo: Repo, revision: str) -> _Reply:
        commit = self._at(repo, revision)
        form = parse_qs(self._body().decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        return _json([
            self._listed(commit, path, expand=expand)
            for path in form.get("paths", [])
            if path in commit.tree
        ])  # fmt: skip

    # files

    def _resolve(self, repo: Repo, revision: str, path: str) -> _Reply:
        if repo.gated and self._token() != WRITE_TOKEN:
            raise _AnswerError(403, "Access to model is restricted", "GatedRepo")
        commit = self._at(repo, revision)
        entry = commit.tree.get(path)
        if entry is None:
            raise _AnswerError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.oid or entry.git_oid}"'}
        if entry.oid is None:
            return self._ranged(entry.content or b"", headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.oid}"'}
        # Another origin, as the Hub's CDN is: a token must not be sent there.
        away = self.hub.url.replace("127.0.0.1", "localhost")
        headers["Location"] = f"{away}/cdn/{entry.oid}?signature={_signature(entry.oid)}"
        return _Reply(302, headers)

    def _cdn(self, oid: str) -> _Reply:
        if "Authorization" in self.headers:
            raise _AnswerError(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != _signature(oid):
            raise _AnswerError(403, "SignatureDoesNotMatch")
        reply = self._ranged(self.hub.read(Entry(None, oid, 0)), {})
        self.hub.served += len(reply.body)
        return reply

    def _ranged(self, content: bytes, headers: dict[str, str]) -> _Reply:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return _Reply(200, headers, content)
        offset = int(wanted[1])
        if offset >= len(content):
            raise _AnswerError(416, "Range Not Satisfiable")
        headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        return _Reply(206, headers, content[offset:])

    # writing

    def _preupload(self, repo: Repo, revision: str) -> _Reply:
        commit = self._at(repo, revision)
        asked = self._body_json()
        ignored = asked["gitIgnore"].split() if "gitIgnore" in asked else repo.gitignore
        answers = []
        for file in asked["files"]:
            entry = commit.tree.get(file["path"])
            sample = base64.b64decode(file["sample"])
            assert len(sample) == min(512, file["size"]), "the first 512 bytes are the sample"
            large = file["size"] >= self.hub.lfs_from_bytes or b"\0" in sample
            mode = "lfs" if large and not self.hub.all_regular else "regular"
            answers.append({
                "path": file["path"],
                "uploadMode": mode,
                "shouldIgnore": any(fnmatch.fnmatch(file["path"], rule) for rule in ignored),
                "oid": entry and (entry.oid or entry.git_oid),
            })  # fmt: skip
        return _json({"files": answers})

    def _batch(self, repo: Repo) -> _Reply:
        asked = self._body_json()
        assert asked["operation"] == "upload"
        return _json({"transfer": "basic", "objects": [
            self._object(repo, each["oid"], each["size"]) for each in asked["objects"]
        ]})  # fmt: skip

    def _object(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        there = self.hub.object(oid)
        if oid in repo.objects and there.stat().st_size == size:
            return {"oid": oid, "size": size}
        href = f"{self.hub.url}/lfs/{oid}"
        signed = f"signature={_signature(oid)}&repo={quote(repo.id, safe='')}"
        upload: dict[str, Any] = {"href": f"{href}?{signed}"}
        if self.hub.part_bytes is not None and size > self.hub.part_bytes:
            count = -(-size // self.hub.part_bytes)
            upload["href"] = f"{href}/complete?{signed}"
            upload["header"] = {
                "chunk_size": str(self.hub.part_bytes),
                **{str(n): f"{href}/part/{n}?{signed}" for n in range(1, count + 1)},
            }
        verify = {"href": f"{self.hub.url}/{repo.id}.git/info/lfs/objects/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _signed(self, oid: str) -> Repo:
        if "Authorization" in self.headers:
            raise _AnswerError(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != _signature(oid):
            raise _AnswerError(403, "SignatureDoesNotMatch")
        return self.hub.repos[self.query["repo"]]

    def _put_object(self, oid: str) -> _Reply:
        repo = self._signed(oid)
        self._receive(oid)
        found = self.hub.object(f"{oid}.part")
        with found.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._keep(repo, oid, found, digest)
        return _Reply(200, {"ETag": '"x"'})

    def _put_part(self, oid: str, number: int) -> _Reply:
        self._signed(oid)
        self._receive(f"{oid}.{number}")
        return _Reply(200, {"ETag": f'"{number}"'})

    def _complete(self, oid: str) -> _Reply:
        repo = self._signed(oid)
        asked = self._body_json()
        whole = self.hub.object(f"{oid}.part")
        digest = hashlib.sha256()
        with whole.open("wb") as file:
            for part in asked["parts"]:
                content = self.hub.object(f"{oid}.{part['partNumber']}.part").read_bytes()
                digest.update(content)
                file.write(content)
        self._keep(repo, oid, whole, digest.hexdigest())
        return _json({})

    def _receive(self, name: str) -> None:
        with self.hub.object(f"{name}.part").open("wb") as file:
            for chunk in self._chunks():
                file.write(chunk)
                self.hub.received += len(chunk)

    def _keep(self, repo: Repo, oid: str, part: Path, digest: str) -> None:
        if digest != oid:
            part.unlink()
            raise _AnswerError(400, "the bytes are not those of the object")
        with self.hub.lock:
            part.replace(self.hub.object(oid))
            repo.objects.add(oid)

    def _verify(self, repo: Repo) -> _Reply:
        asked = self._body_json()
        there = self.hub.object(asked["oid"])
        if asked["oid"] not in repo.objects or there.stat().st_size != asked["size"]:
            raise _AnswerError(404, "no such object")
        return _json({})

    def _commit(self, repo: Repo, branch: str) -> _Reply:
        lines = [json.loads(line) for line in self._body().splitlines()]
        assert lines[0]["key"] == "header"
        if branch not in repo.branches:
            raise _AnswerError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.commits[repo.branches[branch]]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != head.id:
            raise _AnswerError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for line in lines[1:]:
            self._change(repo, tree, line["key"], line["value"])
        made = repo.commit(tree, head.id, lines[0]["value"]["summary"])
        repo.branches[branch] = made.id
        url = f"{self.hub.url}/{repo.id}/commit/{made.id}"
        return _json({"success": True, "commitOid": made.id, "commitUrl": url})

    def _change(self, repo: Repo, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        match key:
            case "file":
                content = base64.b64decode(value["content"])
                if path == "README.md" and (problem := front_matter_problem(content.decode())):
                    raise _AnswerError(400, f"Invalid metadata in README.md: {problem}")
                tree[path] = regular(content)
            case "lfsFile":
                if value["oid"] not in repo.objects:
                    raise _AnswerError(400, f"{path}: LFS object {value['oid']} does not exist")
                size = self.hub.object(value["oid"]).stat().st_size
                tree[path] = Entry(None, value["oid"], size)
            case "deletedFile":
                if path not in tree:
                    raise _AnswerError(404, "A file with this name doesn't exist", "EntryNotFound")
                del tree[path]
            case _:
                raise _AnswerError(400, f"what is {key}?")


def _signature(oid: str) -> str:
    return hashlib.sha256(f"secret {oid}".encode()).hexdigest()


def front_matter_problem(content: str) -> str:
    """Say what the Hub would not take in the metadata of a README; empty if nothing."""
    match = re.match(r"---\n(.*?\n)---\n", content, re.DOTALL)
    if match is None:
        return "" if not content.startswith("---") else "it is not closed"
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return str(error)
    if not isinstance(metadata, dict):
        return "it is no mapping"
    # The Hub knows these words and refuses others; of another licence `other` with its name.
    license_ = metadata.get("license")
    if license_ is not None and not re.fullmatch(r"[a-z0-9.-]+", str(license_)):
        return f'"license" must be one of the known ones, not {license_!r}'
    for name in metadata.get("base_model") or []:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return f'"base_model" {name!r} is no repository'
    return ""


def tampered(hub: Hub, repo: str, path: str, entry: Entry, revision: str = "main") -> None:
    """Put other content where somebody could not: into a commit that is there already."""
    kept = hub.repos[repo]
    commit = kept.at(revision)
    assert commit is not None
    kept.commits[commit.id] = replace(commit, tree={**commit.tree, path: entry})


def committed(hub: Hub, repo: str, path: str, entry: Entry | None, branch: str = "main") -> str:
    """Commit a file as somebody else would, or its removal; return the commit."""
    kept = hub.repos[repo]
    with hub.lock:
        head = kept.commits[kept.branches[branch]]
        tree = {**head.tree, path: entry} if entry else dict(head.tree)
        if entry is None:
            del tree[path]
        made = kept.commit({k: v for k, v in tree.items() if v}, head.id, "by hand")
        kept.branches[branch] = made.id
    return made.id
