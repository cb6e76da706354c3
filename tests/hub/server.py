"""The server of the stand-in: what the Hub answers to whom."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import secrets
import socket
import struct
import tempfile
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from .faults import KINDS, PAGE, Fault, Reply, Reset, Scene, Where
from .repository import POINTER_BYTES, Commit, File, Repo

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from datetime import datetime

    import pytest

_PARTIAL: Final = 206
# The token of somebody who may read what is private or gated.
INSIDER: Final = "hf_insiderCanaryInsiderCanary"


@dataclass
class Request:
    """
    One request and what came of it.

    Attributes:
        path: Decoded, without the query.
        range: The Range header; empty if there was none.
        authorized: Whether it carried a token.
        status: Of the answer; None if the connection ended without one.
        sent_bytes: Bytes of the body that left.
        fault: Kind of what was done to it; empty if nothing was.
    """

    method: str
    path: str
    query: dict[str, str]
    range: str
    authorized: bool
    status: int | None = None
    sent_bytes: int = 0
    fault: str = ""

    def __str__(self) -> str:
        """As a test shows it."""
        told = f"{self.method} {self.path} {self.range}: {self.status}, {self.sent_bytes} bytes"
        return f"{told} ({self.fault})" if self.fault else told


@dataclass
class _Strike:
    pattern: str
    method: str
    fault: Fault
    left: int | None


class Hub:
    """
    The stand-in: its repositories, its address, and what it was asked.

    Attributes:
        url: Address to use as endpoint; of loopback.
        repos: By the name that they have now.
        moved: From an old name to the new one.
        objects: What is in LFS, by sha256; of deleted repositories, too.
        requests: Every request, in the order of arrival.
        unexpected: Requests that the Hub would not know.
        page: Commits, or entries of a tree, on one page.
    """

    def __init__(self) -> None:
        """Begin to answer, on a free port."""
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.objects: dict[str, File] = {}
        self.requests: list[Request] = []
        self.unexpected: list[str] = []
        self.page = 50
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._strikes: list[_Strike] = []
        self._secret = secrets.token_hex(8)
        self._home = tempfile.TemporaryDirectory(prefix="hub-home-")
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another origin, as the Hub's storage is: a token must not be sent there.
        self.storage_url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        """Use it as a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; open connections end."""
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.end_connections()
        self._server.server_close()
        self._home.cleanup()

    def create(
        self,
        name: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        at: datetime | None = None,
    ) -> Repo:
        """Make a repository with one commit on main."""
        with self.lock:
            assert name not in self.repos, f"{name} is there already"
            self.moved.pop(name, None)
            repo = Repo(self, name, secrets.token_hex(12), private=private)
            repo.commit(files or {}, "initial commit", at=at)
            self.repos[name] = repo
            return repo

    def env(self) -> dict[str, str]:
        """Return the environment in which a child process uses this Hub, and no other."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_TOKEN": "",
            "HF_HOME": self._home.name,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process use this Hub, whether it has imported huggingface_hub or not."""
        for name, value in self.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)

    def asked(self, pattern: str = "*", method: str = "*") -> list[Request]:
        """Return the requests whose path fits a glob."""
        with self.lock:
            return [
                each
                for each in self.requests
                if fnmatch.fnmatchcase(each.path, pattern)
                and fnmatch.fnmatchcase(each.method, method)
            ]

    def sent_bytes(self, pattern: str = "*") -> int:
        """Return the bytes of all bodies that left, of paths that fit a glob."""
        return sum(each.sent_bytes for each in self.asked(pattern))

    def forget(self, about: str = "") -> None:
        """
        Count requests from here, and let nothing go wrong any more.

        Args:
            about: Only requests with this in their path, and faults with it in their pattern.
        """
        with self.lock:
            self.requests = [each for each in self.requests if about not in each.path]
            self._strikes = [each for each in self._strikes if about not in each.pattern]

    def fault(
        self, pattern: str, fault: Fault, *, method: str = "*", times: int | None = 1
    ) -> None:
        """
        Let something go wrong with the next requests that fit.

        Args:
            pattern: Glob over the path, of a file's own address or of that in the storage.
            fault: What to do; see `faults.KINDS`.
            method: Glob.
            times: How often; None for always. Of several faults the first that fits is done.
        """
        assert fault.kind in KINDS, f"no kind of fault is called {fault.kind}"
        with self.lock:
            self._strikes.append(_Strike(pattern, method, fault, times))

    def struck(self, request: Request, fits: Collection[Where] | None = None) -> Fault | None:
        """Take the fault that is next for a request; an event if its answer is not made yet."""
        for strike in self._strikes:
            kind = KINDS[strike.fault.kind]
            is_event = kind.event is not None
            if (
                strike.left != 0
                and (is_event if fits is None else not is_event and kind.where in fits)
                and fnmatch.fnmatchcase(request.path, strike.pattern)
                and fnmatch.fnmatchcase(request.method, strike.method)
            ):
                strike.left = None if strike.left is None else strike.left - 1
                request.fault = strike.fault.kind
                return strike.fault
        return None

    def signature(self, path: str) -> str:
        """Return what makes an address of the storage valid."""
        return hashlib.sha256(f"{self._secret} {path}".encode()).hexdigest()[:16]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512
    hub: Hub

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end_connections(self) -> None:
        """Let threads that wait for a next request end."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        """A client that left is none of our business."""


class _AnswerError(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.reply = _json({"error": message}, status, headers)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    body = json.dumps(value).encode()
    return Reply(status, {"Content-Type": "application/json", **(headers or {})}, body)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _handle(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query).items()}
        # Not unquoted as a whole: a branch may hold an encoded slash.
        self.parts = [unquote(part) for part in split.path.split("/")[1:]]
        self.form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        self.whole = b""
        request = Request(
            self.command,
            unquote(split.path),
            self.query,
            self.headers.get("Range", ""),
            "Authorization" in self.headers,
        )
        with self.hub.lock:
            self.hub.requests.append(request)
            self._meanwhile(request)
            try:
                reply = self._routed()
            except _AnswerError as error:
                reply = error.reply
            if fault := self.hub.struck(request, self._fitting(reply)):
                change = KINDS[fault.kind].change
                assert change is not None
                change(reply, fault, self._scene())
        with contextlib.suppress(OSError):
            self._send(reply, request)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815 - its names

    def _meanwhile(self, request: Request) -> None:
        """Let happen in the repository what is to happen before this request is answered."""
        repo = self.hub.repos.get(_repository(self.parts))
        if repo is not None and (fault := self.hub.struck(request)):
            event = KINDS[fault.kind].event
            assert event is not None
            event(repo)

    def _fitting(self, reply: Reply) -> list[Where]:
        fits: list[Where] = ["any"]
        if reply.body and reply.status in {200, 206} and self.command == "GET":
            fits.append("bytes")
            if reply.shows == "listing":
                fits.append("listing")
            if reply.shows == "file" and reply.status == _PARTIAL:
                fits.append("range")
        if "X-Repo-Commit" in reply.headers:
            fits.append("head")
        return fits

    def _scene(self) -> Scene:
        return Scene(
            whole=self.whole,
            address=f"http://{self.headers['Host']}{self.path}",
            portal=f"{self.hub.storage_url}/portal",
            closing=self.hub.closing,
        )

    def _send(self, reply: Reply, request: Request) -> None:
        request.status = reply.status or None
        if reply.status:
            self._send_head(reply)
        chunked = reply.framing == "chunked"
        try:
            for piece in [reply.body] if reply.stream is None else reply.stream:
                if self.command == "HEAD" and reply.status:
                    return
                if not piece:
                    continue
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                request.sent_bytes += len(piece)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except Reset:
            self._reset()

    def _send_head(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.framing == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif reply.framing == "close":
            self.send_header("Connection", "close")
        elif reply.stream is None:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()

    def _reset(self) -> None:
        """End the connection in disorder: the other side is told so, not that all has come."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())

    # what is asked

    def _routed(self) -> Reply:  # noqa: PLR0911 - one for each kind of request
        match self.command, *self.parts:
            case "GET", "api", "models", owner, name:
                repo = self._repo(owner, name)
                return self._info(repo, repo.commits[repo.head])
            case "GET", "api", "models", owner, name, "revision", revision:
                repo = self._repo(owner, name)
                return self._info(repo, self._at(repo, revision))
            case "GET", "api", "models", owner, name, "refs":
                return self._refs(self._repo(owner, name))
            case "GET", "api", "models", owner, name, "commits", revision:
                return self._commits(self._repo(owner, name), revision)
            case "GET", "api", "models", owner, name, "tree", revision:
                return self._tree(self._repo(owner, name), revision)
            case "POST", "api", "models", owner, name, "paths-info", revision:
                return self._paths_info(self._repo(owner, name), revision)
            case "GET" | "HEAD", owner, name, "resolve", revision, *path if path:
                return self._resolve(self._repo(owner, name), revision, "/".join(path))
            case "GET" | "HEAD", "storage", sha256, *_:
                return self._storage(sha256)
            case "GET" | "HEAD", "portal":
                return Reply(200, {"Content-Type": "text/html"}, PAGE)
            case _:
                pass
        self.hub.unexpected.append(f"{self.command} {self.path}")
        raise _AnswerError(501, f"the stand-in knows no {self.command} {self.path}")

    def _repo(self, owner: str, name: str) -> Repo:
        """Find a repository that this reader may see."""
        authorization = self.headers.get("Authorization", "")
        if authorization not in {"", f"Bearer {INSIDER}"}:
            raise _AnswerError(401, "Invalid credentials in Authorization header")
        full = f"{owner}/{name}"
        if full in self.hub.moved:
            # Relative, with what follows the name.
            location = self.path.replace(f"/{full}", f"/{self.hub.moved[full]}", 1)
            headers = {"Location": location, "Content-Type": "text/plain"}
            raise _redirect(307, headers)
        repo = self.hub.repos.get(full)
        if repo is None or (repo.private and not authorization):
            # To whom it does not know, the Hub does not say which of both it is.
            raise _AnswerError(
                404 if authorization else 401,
                "Repository not found" if authorization else "Invalid username or password.",
                "RepoNotFound",
            )
        if repo.disabled:
            raise _AnswerError(403, "Access to this resource is disabled.")
        return repo

    @staticmethod
    def _at(repo: Repo, revision: str) -> Commit:
        found = repo.find(revision)
        if found is None:
            raise _AnswerError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    # what is listed

    def _info(self, repo: Repo, commit: Commit) -> Reply:
        siblings: list[dict[str, Any]] = []
        for path, file in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                sibling |= {"size": len(file.content), "blobId": file.blob_id}
                if file.is_lfs:
                    sibling["lfs"] = {
                        "sha256": file.sha256,
                        "size": len(file.content),
                        "pointerSize": POINTER_BYTES,
                    }
            siblings.append(sibling)
        first = repo.history(commit.id)[-1]
        reply = _json({
            "_id": repo.id, "id": repo.name, "modelId": repo.name, "author": repo.owner,
            "sha": commit.id, "lastModified": _instant(commit.at),
            "createdAt": _instant(first.at), "private": repo.private,
            "gated": repo.gated or False, "disabled": False, "tags": [], "downloads": 0,
            "likes": 0, "siblings": siblings,
        })  # fmt: skip
        reply.shows = "listing"
        return reply

    def _refs(self, repo: Repo) -> Reply:
        def shown(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": id_}
                for name, id_ in refs.items()
            ]

        return _json({"branches": shown(repo.branches, "heads"), "converts": [],
                      "tags": shown(repo.tags, "tags")})  # fmt: skip

    def _commits(self, repo: Repo, revision: str) -> Reply:
        history = repo.history(self._at(repo, revision).id)
        number = int(self.query.get("p", "0"))
        start = number * self.hub.page
        shown = [
            {
                "id": commit.id,
                "title": commit.title,
                "message": "",
                "authors": [{"user": repo.owner}],
                "date": _instant(commit.authored_at),
            }
            for commit in history[start : start + self.hub.page]
        ]
        more = start + self.hub.page < len(history)
        return _json(shown, headers=self._next(p=number + 1) if more else None)

    def _tree(self, repo: Repo, revision: str) -> Reply:
        commit = self._at(repo, revision)
        recursive = self.query.get("recursive", "false").lower() in {"true", "1"}
        folders = sorted({path.rpartition("/")[0] for path in commit.tree if "/" in path})
        found: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders
        ]
        found += [
            _listed(file)
            for path, file in sorted(commit.tree.items())
            if recursive or "/" not in path
        ]
        start = int(self.query.get("cursor", "0"))
        end = start + self.hub.page
        more = end < len(found)
        return _json(found[start:end], headers=self._next(cursor=end) if more else None)

    def _paths_info(self, repo: Repo, revision: str) -> Reply:
        tree = self._at(repo, revision).tree
        return _json([_listed(tree[path]) for path in self.form.get("paths", []) if path in tree])

    def _next(self, **query: int) -> dict[str, str]:
        following = urlencode(self.query | {key: str(value) for key, value in query.items()})
        path = urlsplit(self.path).path
        return {"Link": f'<{self.hub.url}{path}?{following}>; rel="next"'}

    # what is read

    def _resolve(self, repo: Repo, revision: str, path: str) -> Reply:
        token = self.headers.get("Authorization")
        if repo.gated and not token:
            message = f"Access to model {repo.name} is restricted. You must have access to it."
            raise _AnswerError(401, message, "GatedRepo")
        commit = self._at(repo, revision)
        file = commit.tree.get(path)
        if file is None:
            raise _AnswerError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return self._ranged(file.content, headers | {"ETag": f'"{file.etag}"'})
        signature = self.hub.signature(file.sha256)
        signed = f"/storage/{file.sha256}/{quote(repo.name)}/{quote(path)}?signature={signature}"
        return Reply(302, headers | {
            "X-Linked-Size": str(len(file.content)),
            "X-Linked-Etag": f'"{file.etag}"',
            "ETag": f'"{file.etag}"',
            "Location": self.hub.storage_url + signed,
        })  # fmt: skip

    def _storage(self, sha256: str) -> Reply:
        if "Authorization" in self.headers:
            raise _AnswerError(400, "Only one auth mechanism allowed")
        if self.query.get("signature") != self.hub.signature(sha256):
            raise _AnswerError(403, "SignatureDoesNotMatch")
        file = self.hub.objects.get(sha256)
        if file is None:
            raise _AnswerError(404, "NoSuchKey")
        etag = hashlib.md5(file.content).hexdigest()
        return self._ranged(file.content, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> Reply:
        """Answer with all of it, or with the range that was asked for."""
        self.whole = content
        headers = {"Content-Type": "application/octet-stream", **headers}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range")
        if wanted is None or condition not in {None, headers["ETag"]}:
            return Reply(200, headers, content, shows="file")
        size = len(content)
        first, last = wanted.groups()
        if first:
            start, end = int(first), min(int(last or size), size - 1)
        else:
            start, end = max(0, size - int(last)), size - 1
        if start >= size or end < start:
            return Reply(416, headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return Reply(_PARTIAL, headers, content[start : end + 1], shows="file")


def _repository(parts: list[str]) -> str:
    """Return the name of the repository that a path is about."""
    about = parts[2:] if parts[:2] == ["api", "models"] or parts[0] == "storage" else parts
    return "/".join(about[:2])


def _redirect(status: int, headers: dict[str, str]) -> _AnswerError:
    error = _AnswerError(status, "Temporary Redirect")
    error.reply = Reply(status, headers, b"Temporary Redirect")
    return error


def _instant(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _listed(file: File) -> dict[str, Any]:
    listed: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": len(file.content),
                              "path": file.name}  # fmt: skip
    if file.is_lfs:
        listed["lfs"] = {
            "oid": file.sha256,
            "size": len(file.content),
            "pointerSize": POINTER_BYTES,
        }
    return listed
