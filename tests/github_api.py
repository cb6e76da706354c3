"""
A strict stand-in of GitHub's REST API, in threads of this process or as a process of its own.

    with GitHubApi(tmp_path / "o.git") as api:
        head = api.git.commit("feature", {"params.yaml": "..."})
        number = api.add_pull("feature")
        ...                                  # GITHUB_API_URL=api.url GITHUB_TOKEN=api.token
        assert api.comments_of(number)[0]["body"] == ...
    # leaving the block asserts that every request was one that GitHub knows

Every request is held against GitHub's OpenAPI description: an unknown path is 501, an undescribed
parameter or property, a missing version header and an unknown token are violations; so are answers
of the stand-in that GitHub would not give. Objects are the documented examples with our values in
them. Branches, trees and commits are those of a real bare repository (`api.git`).

State, to be read and changed by tests (under `api.lock` while requests run):

    pulls, issues, comments, check_runs, artifacts, runs, runners, releases      by number
    settings      what is under Settings: see tests/github_settings.py
    tokens        what each token is called and may do; `api.token` is that of a job
    requests      every request, in order; `faults` by `strike`
    violations    sentences; `api.check()` asserts that there are none

As a process: `python tests/github_api.py --repository o/r --git DIR [--port N] [--state FILE]
[--base-path /api/v3] [--pulls JSON]` prints the address as its first line and writes the whole
state to FILE after every request; PUT /_stand-in/artifacts/NAME?run=N takes the bytes of an
artifact's zip, and GET /_stand-in/state gives the state.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import re
import socket
import struct
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import node_tools
from github_git import BareRepository, GitError
from github_openapi import AnswerError, Contract, Operation, load
from github_settings import ROUTES, Settings, of_repository

if TYPE_CHECKING:
    from collections.abc import Callable

R: Final = "/repos/{owner}/{repo}"
API_VERSIONS: Final = {"2022-11-28"}
ACTIONS: Final = "github-actions[bot]"

Kind = Literal[
    "status",  # answers `status` with `headers` and `body`; nothing is done
    "refuse",  # breaks the connection; nothing is done
    "lose",  # does it, and breaks the connection before the answer
    "hang",  # says nothing, until the client goes or `pause_s` is over; nothing is done
    "html",  # 200 and a page, as a proxy shows
    "cut",  # does it, and breaks off in the middle of the answer
    "slow",  # does it after `pause_s`
]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault; which fields count is said at its kind."""

    kind: Kind
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    pause_s: float = 30.0


@dataclass
class Seen:
    """One request: what it asked, as whom, and what it was answered (None: nothing)."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    status: int | None = None

    @property
    def is_write(self) -> bool:
        """Whether it wanted to change something."""
        return self.method != "GET"

    def __str__(self) -> str:
        """`POST issues/7/comments`."""
        return f"{self.method} {re.sub(r'^/repos/[^/]+/[^/]+/', '', self.path)}"


@dataclass(frozen=True)
class Token:
    """
    Who a token is, and what it may do.

    Attributes:
        login: `github-actions[bot]` of a job, `SLUG[bot]` of an App, a person's otherwise.
        permissions: As under `permissions:` of a job; None allows everything.
    """

    login: str
    permissions: dict[str, str] | None = None

    @property
    def is_bot(self) -> bool:
        """Whether it is that of a job or of an App."""
        return self.login.endswith("[bot]")


@dataclass
class _Strike:
    fault: Fault
    at: int | None
    matches: str | None
    left: int


@dataclass
class Artifact:
    """What a run left behind: the bytes of a zip."""

    id: int
    run_id: int
    name: str
    data: bytes
    created_at: str
    expired: bool = False
    digest: str | None = None
    size_bytes: int | None = None


@dataclass
class Call:
    """A request that is being answered."""

    operation: Operation
    query: dict[str, str]
    body: dict[str, Any]
    token: Token
    base: str

    def number(self, name: str) -> int:
        """A number of the path."""
        return int(self.operation.path[name])


Handler = "Callable[[GitHubApi, Call], tuple[int, Any]]"
_ROUTES: dict[tuple[str, str], Any] = dict(ROUTES)


def _route(method: str, template: str) -> Callable[[Any], Any]:
    def register(handler: Any) -> Any:
        _ROUTES[method, template] = handler
        return handler

    return register


def now() -> str:
    """The time as GitHub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def zipped(files: dict[str, str | bytes]) -> bytes:
    """Return files as a zip, as the upload of an artifact makes one."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


class GitHubApi:
    """One repository; see the module."""

    def __init__(
        self,
        git: Path,
        *,
        repository: str = "octo/fleet",
        base_path: str = "",
        port: int = 0,
        contract: Contract | None = None,
    ) -> None:
        """
        Begin to serve.

        Args:
            git: The bare repository; made if it is not there.
            repository: OWNER/NAME.
            base_path: `/api/v3`, as on an Enterprise Server.
            port: Of loopback; a free one if 0.
            contract: GitHub's description; from npm if absent, and the test is skipped without.
        """
        self.contract = contract or load(node_tools.openapi())
        self.repository = repository
        self.base_path = base_path
        self.default_branch = "main"
        self.git = BareRepository(git) if git.exists() else BareRepository.create(git)
        self.lock = threading.RLock()
        self.token = "ghs_of-a-job"
        self.tokens: dict[str, Token] = {
            self.token: Token(ACTIONS),
            "ghs_of-an-app": Token("fleet-of-octo[bot]"),
            "ghp_of-a-person": Token("mona"),
        }
        # Of the repository: those that the page on settings wants, and what is used.
        kinds = "weights tokenizer template config generation licence card engine"
        self.labels = {"bump", *(f"bump: {kind}" for kind in kinds.split())}
        self.settings = Settings()
        self.pulls: dict[int, dict[str, Any]] = {}
        self.issues: dict[int, dict[str, Any]] = {}
        self.comments: dict[int, dict[str, Any]] = {}
        self.check_runs: dict[int, dict[str, Any]] = {}
        self.artifacts: dict[int, Artifact] = {}
        self.runs: dict[int, dict[str, Any]] = {}
        self.runners: dict[int, dict[str, Any]] = {}
        self.releases: dict[int, dict[str, Any]] = {}
        self.deprecations: dict[str, dict[str, Any]] = {}
        self.jobs: dict[int, list[dict[str, Any]]] = {}
        self.workflows: dict[str, str] = {}
        self.dispatched: list[dict[str, Any]] = []
        self.requests: list[Seen] = []
        self.violations: list[str] = []
        self.state_file: Path | None = None
        self._faults: list[_Strike] = []
        self._ids = 1000
        self._answered: dict[str, int] = {}
        self._served = [_serve(self, _ApiHandler, port), _serve(self, _BlobHandler, 0)]
        self.url = f"http://127.0.0.1:{self._served[0].server_port}{base_path}"
        self.blob_url = f"http://127.0.0.1:{self._served[1].server_port}"

    def __enter__(self) -> Self:
        """Use it as a block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop; a violation fails the test, unless it failed already."""
        self.close()
        if kind is None:
            self.check()

    def close(self) -> None:
        """Stop serving."""
        for server in self._served:
            server.stopped.set()
            server.shutdown()
            server.server_close()

    def check(self) -> None:
        """Assert that every request was one that GitHub knows, and every answer one of its."""
        assert not self.violations, "\n".join(self.violations)

    def environment(self, token: str | None = None) -> dict[str, str]:
        """Return what a runner sets for a job of this repository."""
        return {
            "GITHUB_API_URL": self.url,
            "GITHUB_REPOSITORY": self.repository,
            "GITHUB_TOKEN": token or self.token,
        }

    # --- for tests

    def strike(
        self, fault: Fault, *, at: int | None = None, matches: str | None = None, times: int = 1
    ) -> None:
        """
        Do `fault` to the next requests that fit.

        Args:
            fault: What to do.
            at: Index in `requests`, from 0.
            matches: Regular expression that `str(seen)` has to match: `POST .*/comments`.
            times: How many; -1 for all.
        """
        with self.lock:
            self._faults.append(_Strike(fault, at, matches, times))

    def forget(self) -> None:
        """No faults, no requests seen; the state stays."""
        with self.lock:
            self._faults.clear()
            self.requests.clear()

    def add_pull(  # noqa: PLR0913 - what a pull request is made of
        self,
        branch: str,
        *,
        base: str = "main",
        sha: str | None = None,
        head_repository: str | None = None,
        title: str = "A change",
        body: str | None = None,
        login: str = "mona",
    ) -> int:
        """Open a pull request; `sha` is needed only for a branch of another repository."""
        with self.lock:
            number = self._number()
            self.pulls[number] = {
                "number": number,
                "head": branch,
                "sha": sha,
                "head_repository": head_repository or self.repository,
                "base": base,
                "title": title,
                "body": body,
                "state": "open",
                "login": login,
                "labels": [],
                "reviewers": [],
                "merged": False,
            }
            return number

    def add_issue(self, title: str, body: str, labels: list[str], login: str = ACTIONS) -> int:
        """Open an issue."""
        with self.lock:
            number = self._number()
            self.issues[number] = {
                "number": number,
                "title": title,
                "body": body,
                "labels": labels,
                "state": "open",
                "state_reason": None,
                "login": login,
            }
            return number

    def add_comment(self, number: int, body: str, login: str = ACTIONS) -> int:
        """Write a comment."""
        with self.lock:
            made = self._id()
            self.comments[made] = {"id": made, "issue": number, "body": body, "login": login}
            return made

    def add_artifact(
        self, run_id: int, name: str, data: bytes | dict[str, str | bytes], **fields: Any
    ) -> int:
        """Leave an artifact behind: the bytes of a zip, or the files in it."""
        with self.lock:
            made = self._id()
            content = zipped(data) if isinstance(data, dict) else data
            options = {"created_at": now(), **fields}
            self.artifacts[made] = Artifact(made, run_id, name, content, **options)
            return made

    def add_runner(self, name: str, labels: list[str], **fields: Any) -> int:
        """Register a runner; fields as GitHub calls them: status, busy, os, version."""
        with self.lock:
            made = self._id()
            self.runners[made] = {"name": name, "labels": labels, **fields}
            return made

    def comments_of(self, number: int) -> list[dict[str, Any]]:
        """Return the comments on an issue or pull request, the oldest first."""
        with self.lock:
            return [each for each in self.comments.values() if each["issue"] == number]

    def head_of(self, number: int) -> str:
        """Return the commit that a pull request is at."""
        pull = self.pulls[number]
        if pull["sha"] is None:
            found = self.git.head(pull["head"])
            assert found is not None, f"there is no branch {pull['head']}"
            if pull["state"] == "open":
                return found
            pull["sha"] = found
        sha: str = pull["sha"]
        return sha

    def close_pull(self, number: int, *, merge: bool = False) -> str | None:
        """Close a pull request as a person does; return the merge commit if it is merged."""
        with self.lock:
            pull = self.pulls[number]
            head = self.head_of(number)
            pull.update(state="closed", sha=head, merged=merge)
            if not merge:
                return None
            base = self.git.head(pull["base"])
            assert base is not None
            tree = self.git.text("merge-tree", "--write-tree", base, head).splitlines()[0]
            made = self.git.commit_tree(tree, [base, head], f"Merge pull request #{number}")
            self.git.git("update-ref", f"refs/heads/{pull['base']}", made)
            return made

    def state(self) -> dict[str, Any]:
        """Return everything that there is, as JSON."""
        with self.lock:
            return {
                "pulls": {str(key): dict(value) for key, value in self.pulls.items()},
                "issues": {str(key): value for key, value in self.issues.items()},
                "comments": list(self.comments.values()),
                "check_runs": list(self.check_runs.values()),
                "artifacts": [
                    {"id": each.id, "run_id": each.run_id, "name": each.name}
                    for each in self.artifacts.values()
                ],
                "releases": list(self.releases.values()),
                "dispatched": self.dispatched,
                "requests": [str(each) for each in self.requests],
                "violations": self.violations,
            }

    def _id(self) -> int:
        self._ids += 1
        return self._ids

    def _number(self) -> int:
        return max([0, *self.pulls, *self.issues]) + 1

    # --- one request

    def arrived(self, seen: Seen) -> Fault | None:
        """Note a request; return what is to be done to it."""
        with self.lock:
            self.requests.append(seen)
            for strike in self._faults:
                late = strike.at is not None and len(self.requests) - 1 != strike.at
                other = strike.matches is not None and not re.match(strike.matches, str(seen))
                if strike.left and not late and not other:
                    strike.left -= 1
                    return strike.fault
            return None

    def violated(self, text: str) -> None:
        """Note what GitHub would not know."""
        with self.lock:
            self.violations.append(text)

    def answer(
        self, seen: Seen, raw_query: str, data: bytes, base: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Answer a request: status, JSON (bytes are as they are), headers."""
        with self.lock:
            try:
                return self._done(seen, raw_query, data, base)
            except AnswerError as error:
                return error.status, error.body, {}
            except GitError as error:
                return 422, {"message": str(error)}, {}
            except Exception as error:  # noqa: BLE001 - its own fault is to be seen
                self.violated(f"{seen}: the stand-in failed: {error!r}")
                return 500, {"message": "the stand-in failed"}, {}

    def _done(
        self, seen: Seen, raw_query: str, data: bytes, base: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Do what a request asks for, if GitHub would."""
        operation = self.contract.operation(seen.method, seen.path)
        key = (operation.method, operation.template) if operation else ("", "")
        if operation is None or key not in _ROUTES:
            self.violated(f"{seen}: the stand-in does not know that")
            raise AnswerError(501, "not described, or not served here")
        token = self._token_of(seen, operation)
        problems = [f"{seen}: {each}" for each in operation.problems_of(raw_query, data)]
        if problems:
            self.violations += problems
            raise AnswerError(422, "Validation Failed", errors=problems)
        self._require_ours(operation)
        call = Call(operation, seen.query, seen.body or {}, token, base)
        status, value = _ROUTES[key](self, call)
        if status == 302:
            return status, None, {"Location": value}
        value, headers = _page(value, seen, base)
        self._check_answer(operation, status, value)
        return status, value, headers

    def _check_answer(self, operation: Operation, status: int, value: Any) -> None:
        """Hold the first answers of each kind against the description."""
        name = f"{operation.method} {operation.template} {status}"
        self._answered[name] = self._answered.get(name, 0) + 1
        if self._answered[name] <= 2:
            self.violations += [
                f"{name}: {each}" for each in operation.problems_of_answer(status, value)
            ]

    def _token_of(self, seen: Seen, operation: Operation) -> Token:
        told = seen.headers.get("authorization", "")
        token = self.tokens.get(told.removeprefix("Bearer "))
        if seen.headers.get("x-github-api-version") not in API_VERSIONS:
            self.violated(f"{seen}: without X-GitHub-Api-Version")
        if not seen.headers.get("user-agent"):
            self.violated(f"{seen}: without User-Agent")
        if "json" not in seen.headers.get("accept", ""):
            self.violated(f"{seen}: without Accept")
        if not told.startswith("Bearer ") or token is None:
            raise AnswerError(401, "Bad credentials")
        needed, level = _permission(operation)
        if token.permissions is not None and needed:
            has = [token.permissions.get(each, "none") for each in needed.split("|")]
            if level == "write" and "write" not in has:
                raise AnswerError(403, "Resource not accessible by integration")
            if level == "read" and set(has) == {"none"}:
                status = (
                    403 if needed in {"administration", "organization_self_hosted_runners"} else 404
                )
                raise AnswerError(status, "Resource not accessible by integration")
        return token

    def _require_ours(self, operation: Operation) -> None:
        path = operation.path
        if "owner" in path and f"{path['owner']}/{path['repo']}" != self.repository:
            raise AnswerError(404, "Not Found")

    # --- objects as GitHub shows them

    def user(self, login: str) -> dict[str, Any]:
        """A user, as part of other objects."""
        made: dict[str, Any] = self.contract.example("issue-comment")["user"]
        kind = "Bot" if login.endswith("[bot]") else "User"
        return made | {"login": login, "type": kind}

    def repo(self, full_name: str) -> dict[str, Any]:
        """A repository, as part of a pull request."""
        made: dict[str, Any] = self.contract.example("pull-request")["head"]["repo"]
        owner, _, name = full_name.partition("/")
        return made | {
            "full_name": full_name,
            "name": name,
            "owner": self.user(owner),
            "fork": full_name != self.repository,
            "default_branch": self.default_branch,
        }

    def shown_labels(self, names: list[str]) -> list[dict[str, Any]]:
        """Labels, as part of an issue."""
        base = self.contract.example("label")
        return [base | {"name": name} for name in names]

    def shown_pull(self, number: int, *, simple: bool = False) -> dict[str, Any]:
        """A pull request, in full or as in a list."""
        pull = self.pulls[number]
        made: dict[str, Any] = (
            self.contract.description["components"]["examples"]["pull-request-simple-items"][
                "value"
            ][0]
            if simple
            else self.contract.example("pull-request")
        )
        owner = pull["head_repository"].partition("/")[0]
        base_sha = self.git.head(pull["base"]) or "0" * 40
        made = dict(made)
        made |= {
            "number": number,
            "state": pull["state"],
            "title": pull["title"],
            "body": pull["body"],
            "user": self.user(pull["login"]),
            "labels": self.shown_labels(pull["labels"]),
            "requested_teams": [],  # those of the example lack a field
            "head": made["head"]
            | {
                "ref": pull["head"],
                "sha": self.head_of(number),
                "label": f"{owner}:{pull['head']}",
                "repo": self.repo(pull["head_repository"]),
            },
            "base": made["base"]
            | {
                "ref": pull["base"],
                "sha": base_sha,
                "label": f"{self.repository.partition('/')[0]}:{pull['base']}",
                "repo": self.repo(self.repository),
            },
        }
        made["merged_at"] = now() if pull["merged"] else None
        made["closed_at"] = None if pull["state"] == "open" else now()
        if not simple:
            made["merged"] = pull["merged"]
            made["mergeable"] = self.git.merges(base_sha, self.head_of(number))
        return made

    def shown_issue(self, number: int) -> dict[str, Any]:
        """An issue; a pull request is one too."""
        made = self.contract.example("issue")
        issue = self.issues.get(number)
        if issue is None:
            pull = self.pulls.get(number)
            if pull is None:
                raise AnswerError(404, "Not Found")
            issue = pull | {"state_reason": None}
        else:
            made.pop("pull_request", None)
        return made | {
            "number": number,
            "title": issue["title"],
            "body": issue["body"],
            "state": issue["state"],
            "state_reason": issue["state_reason"],
            "labels": self.shown_labels(issue["labels"]),
            "user": self.user(issue["login"]),
        }

    def shown_comment(self, comment: dict[str, Any]) -> dict[str, Any]:
        """A comment."""
        made = self.contract.example("issue-comment")
        return made | {
            "id": comment["id"],
            "body": comment["body"],
            "user": self.user(comment["login"]),
        }

    def shown_check(self, check: dict[str, Any]) -> dict[str, Any]:
        """A check run."""
        made = self.contract.example("check-run")
        output = check.get("output", {})
        made["output"] = made["output"] | {
            "title": output.get("title"),
            "summary": output.get("summary"),
            "text": output.get("text"),
            "annotations_count": len(check["annotations"]),
        }
        keys = ("id", "name", "head_sha", "external_id", "status", "conclusion", "details_url")
        shown = made | {key: check.get(key) for key in keys}
        if check["status"] != "completed":
            shown["completed_at"] = None
        return shown

    def shown_artifact(self, artifact: Artifact) -> dict[str, Any]:
        """An artifact."""
        made = self.contract.example("artifact")
        size = len(artifact.data) if artifact.size_bytes is None else artifact.size_bytes
        digest = artifact.digest or f"sha256:{hashlib.sha256(artifact.data).hexdigest()}"
        return made | {
            "id": artifact.id,
            "name": artifact.name,
            "size_in_bytes": size,
            "expired": artifact.expired,
            "created_at": artifact.created_at,
            "digest": digest,
            "workflow_run": {"id": artifact.run_id},
        }

    def shown_ref(self, ref: str, sha: str) -> dict[str, Any]:
        """A reference."""
        made = self.contract.example("git-ref")
        return made | {"ref": ref, "object": made["object"] | {"type": "commit", "sha": sha}}

    def shown_commit(self, sha: str) -> dict[str, Any]:
        """A commit, as the Git data API shows it."""
        if self.git.resolve(f"{sha}^{{commit}}") != sha:
            raise AnswerError(404, "Not Found")
        made = self.contract.example("git-commit")
        parents = self.git.text("show", "-s", "--format=%P", sha).split()
        return made | {
            "sha": sha,
            "message": self.git.text("show", "-s", "--format=%B", sha),
            "tree": made["tree"] | {"sha": self.git.text("rev-parse", f"{sha}^{{tree}}")},
            "parents": [made["parents"][0] | {"sha": each} for each in parents],
        }

    def shown_runner(self, number: int) -> dict[str, Any]:
        """A runner."""
        runner = self.runners[number]
        labels = [
            {"id": at, "name": name, "type": "custom"} for at, name in enumerate(runner["labels"])
        ]
        base = {"os": "linux", "status": "online", "busy": False}
        return base | runner | {"id": number, "labels": labels}

    def found(self, table: dict[int, Any], number: int) -> Any:
        """Return an entry, or answer 404."""
        if number not in table:
            raise AnswerError(404, "Not Found")
        return table[number]


_PERMISSIONS: Final = (
    (r"/issues/(comments|\{issue_number\})", "issues|pull_requests"),
    (r"/issues", "issues"),
    (r"/pulls", "pull_requests"),
    (r"/check-runs|/commits/\{ref\}/check-runs", "checks"),
    (r"/orgs/\{org\}/actions/runner-groups", "organization_self_hosted_runners"),
    (r"/actions/(runners|permissions)|/vulnerability-alerts", "administration"),
    (r"/branches/\{branch\}/protection", "administration"),
    (r"/actions/(organization-)?secrets", "secrets"),
    (r"/actions/(organization-)?variables", "variables"),
    (r"/environments/\{environment_name\}/secrets", "environments"),
    (r"/labels", "issues|pull_requests"),
    (r"/codeowners", "contents"),
    (r"/actions|/environments", "actions"),
    (r"/git/|/contents|/branches|/commits|/releases|/compare|/dispatches", "contents"),
)


def _permission(operation: Operation) -> tuple[str, str]:
    """Return the permission that an operation needs, and how much of it."""
    below = operation.template.removeprefix(R)
    needed = next((name for pattern, name in _PERMISSIONS if re.match(pattern, below)), "")
    return needed, "read" if operation.method == "get" else "write"


def _page(value: Any, seen: Seen, base: str) -> tuple[Any, dict[str, str]]:
    """Cut a list to the page that was asked for, and name its neighbours."""
    key = None
    if isinstance(value, dict) and "total_count" in value:
        key = next(name for name, each in value.items() if isinstance(each, list))
    entries = value if isinstance(value, list) else value[key] if key else None
    if entries is None or seen.method != "GET":
        return value, {}
    size = min(100, int(seen.query.get("per_page", "30")))
    page = max(1, int(seen.query.get("page", "1")))
    last = max(1, -(-len(entries) // size))
    shown = entries[(page - 1) * size : page * size]
    pages = {"first": 1, "prev": page - 1, "next": page + 1, "last": last}
    links = [
        f'<{base}{seen.path}?{urlencode(seen.query | {"page": str(number)})}>; rel="{name}"'
        for name, number in pages.items()
        if 1 <= number <= last and number != page
    ]
    return (value | {key: shown} if key else shown), ({"Link": ", ".join(links)} if links else {})


# --- pull requests and issues


@_route("get", R)
def _get_repository(api: GitHubApi, _call: Call) -> tuple[int, Any]:
    return 200, api.contract.example("full-repository") | {
        "full_name": api.repository,
        "default_branch": api.default_branch,
        "has_discussions": False,
        **of_repository(api),
    }


@_route("get", f"{R}/pulls")
def _list_pulls(api: GitHubApi, call: Call) -> tuple[int, Any]:
    wanted = call.query.get("state", "open")
    head, base = call.query.get("head"), call.query.get("base")
    found = []
    for number in sorted(api.pulls, reverse=True):
        shown = api.shown_pull(number, simple=True)
        if wanted not in {"all", shown["state"]}:
            continue
        # GitHub ignores a head without an owner.
        if head and ":" in head and shown["head"]["label"] != head:
            continue
        if base and shown["base"]["ref"] != base:
            continue
        found.append(shown)
    return 200, found


@_route("post", f"{R}/pulls")
def _open_pull(api: GitHubApi, call: Call) -> tuple[int, Any]:
    head = call.body["head"].rpartition(":")[2]
    if any(each["head"] == head and each["state"] == "open" for each in api.pulls.values()):
        owner = api.repository.partition("/")[0]
        text = f"A pull request already exists for {owner}:{head}."
        raise AnswerError(422, "Validation Failed", errors=[{"message": text}])
    if api.git.head(head) is None:
        raise AnswerError(422, "Validation Failed", errors=[{"field": "head", "code": "invalid"}])
    number = api.add_pull(
        head,
        base=call.body["base"],
        title=call.body["title"],
        body=call.body.get("body"),
        login=call.token.login,
    )
    return 201, api.shown_pull(number)


@_route("get", f"{R}/pulls/{{pull_number}}")
def _get_pull(api: GitHubApi, call: Call) -> tuple[int, Any]:
    api.found(api.pulls, call.number("pull_number"))
    return 200, api.shown_pull(call.number("pull_number"))


@_route("patch", f"{R}/pulls/{{pull_number}}")
def _change_pull(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("pull_number")
    pull = api.found(api.pulls, number)
    if call.body.get("state") == "closed":
        api.close_pull(number)
    pull.update({key: call.body[key] for key in ("title", "body", "base") if key in call.body})
    return 200, api.shown_pull(number)


@_route("post", f"{R}/pulls/{{pull_number}}/requested_reviewers")
def _request_reviewers(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("pull_number")
    pull = api.found(api.pulls, number)
    pull["reviewers"] += call.body.get("reviewers", []) + call.body.get("team_reviewers", [])
    return 201, api.shown_pull(number, simple=True)


@_route("get", f"{R}/issues")
def _list_issues(api: GitHubApi, call: Call) -> tuple[int, Any]:
    wanted = call.query.get("state", "open")
    labels = set(filter(None, call.query.get("labels", "").split(",")))
    found = [
        each
        for each in map(api.shown_issue, sorted({*api.issues, *api.pulls}, reverse=True))
        if wanted in {"all", each["state"]}
        and labels <= {label["name"] for label in each["labels"]}
    ]
    return 200, found


@_route("post", f"{R}/issues")
def _open_issue(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = api.add_issue(
        call.body["title"], call.body.get("body", ""), call.body.get("labels", []), call.token.login
    )
    return 201, api.shown_issue(number)


@_route("get", f"{R}/issues/{{issue_number}}")
def _get_issue(api: GitHubApi, call: Call) -> tuple[int, Any]:
    return 200, api.shown_issue(call.number("issue_number"))


@_route("patch", f"{R}/issues/{{issue_number}}")
def _change_issue(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("issue_number")
    issue = api.found(api.issues, number)
    issue.update(
        {
            key: call.body[key]
            for key in ("title", "body", "state", "state_reason", "labels")
            if key in call.body
        }
    )
    return 200, api.shown_issue(number)


@_route("get", f"{R}/issues/{{issue_number}}/comments")
def _list_comments(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("issue_number")
    api.shown_issue(number)
    return 200, [api.shown_comment(each) for each in api.comments_of(number)]


def _require_body(call: Call) -> None:
    if len(call.body["body"]) > 65_536:
        raise AnswerError(
            422,
            "Validation Failed",
            errors=[{"message": "body is too long (maximum is 65536 characters)"}],
        )


@_route("post", f"{R}/issues/{{issue_number}}/comments")
def _make_comment(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("issue_number")
    api.shown_issue(number)
    _require_body(call)
    made = api.add_comment(number, call.body["body"], call.token.login)
    return 201, api.shown_comment(api.comments[made])


@_route("get", f"{R}/issues/comments/{{comment_id}}")
def _get_comment(api: GitHubApi, call: Call) -> tuple[int, Any]:
    return 200, api.shown_comment(api.found(api.comments, call.number("comment_id")))


@_route("patch", f"{R}/issues/comments/{{comment_id}}")
def _change_comment(api: GitHubApi, call: Call) -> tuple[int, Any]:
    comment = api.found(api.comments, call.number("comment_id"))
    _require_body(call)
    comment["body"] = call.body["body"]
    return 200, api.shown_comment(comment)


@_route("delete", f"{R}/issues/comments/{{comment_id}}")
def _remove_comment(api: GitHubApi, call: Call) -> tuple[int, Any]:
    api.found(api.comments, call.number("comment_id"))
    del api.comments[call.number("comment_id")]
    return 204, None


@_route("post", f"{R}/issues/{{issue_number}}/labels")
def _add_labels(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number = call.number("issue_number")
    api.shown_issue(number)
    labels = (api.issues.get(number) or api.pulls[number])["labels"]
    rights = call.token.permissions
    may_make = rights is None or rights.get("issues") == "write"
    if not may_make and not api.labels.issuperset(call.body["labels"]):
        # All or nothing.
        raise AnswerError(403, "You do not have permission to create labels on this repository.")
    api.labels.update(call.body["labels"])
    labels += [each for each in call.body["labels"] if each not in labels]
    return 200, api.shown_labels(labels)


@_route("delete", f"{R}/issues/{{issue_number}}/labels/{{name}}")
def _remove_label(api: GitHubApi, call: Call) -> tuple[int, Any]:
    number, name = call.number("issue_number"), call.operation.path["name"]
    api.shown_issue(number)
    labels = (api.issues.get(number) or api.pulls[number])["labels"]
    if name not in labels:
        raise AnswerError(404, "Label does not exist")
    labels.remove(name)
    return 200, api.shown_labels(labels)


# --- check runs


@_route("get", f"{R}/commits/{{ref}}/check-runs")
def _list_checks(api: GitHubApi, call: Call) -> tuple[int, Any]:
    name = call.query.get("check_name")
    found = [
        each
        for each in sorted(api.check_runs.values(), key=lambda each: -each["id"])
        if each["head_sha"] == call.operation.path["ref"] and name in {None, each["name"]}
    ]
    if call.query.get("filter", "latest") == "latest":
        found = list({each["name"]: each for each in reversed(found)}.values())
    shown = [api.shown_check(each) for each in found]
    return 200, {"total_count": len(shown), "check_runs": shown}


def _fill_check(check: dict[str, Any], body: dict[str, Any]) -> None:
    output = dict(body.get("output", {}))
    annotations = output.pop("annotations", [])
    for key in ("summary", "text"):
        if len(output.get(key) or "") > 65_535:
            raise AnswerError(422, f"Invalid request. {key} is too long")
    if len(annotations) > 50:
        raise AnswerError(422, "No more than 50 annotations are allowed per request")
    check.update({key: value for key, value in body.items() if key != "output"})
    check["output"] = check.get("output", {}) | output
    check["annotations"] = [*check.get("annotations", []), *annotations]
    if body.get("conclusion"):
        check["status"] = "completed"


@_route("post", f"{R}/check-runs")
def _make_check(api: GitHubApi, call: Call) -> tuple[int, Any]:
    if not call.token.is_bot:
        raise AnswerError(403, "You must authenticate via a GitHub App.")
    check: dict[str, Any] = {"status": "queued", "login": call.token.login}
    _fill_check(check, call.body)
    check["id"] = api._id()
    api.check_runs[check["id"]] = check
    return 201, api.shown_check(check)


@_route("patch", f"{R}/check-runs/{{check_run_id}}")
def _change_check(api: GitHubApi, call: Call) -> tuple[int, Any]:
    check = api.found(api.check_runs, call.number("check_run_id"))
    if check["login"] != call.token.login:
        raise AnswerError(403, "Invalid app_id")
    _fill_check(check, call.body)
    return 200, api.shown_check(check)


@_route("get", f"{R}/check-runs/{{check_run_id}}")
def _get_check(api: GitHubApi, call: Call) -> tuple[int, Any]:
    return 200, api.shown_check(api.found(api.check_runs, call.number("check_run_id")))


# --- actions


@_route("get", f"{R}/actions/runs/{{run_id}}/artifacts")
def _list_artifacts(api: GitHubApi, call: Call) -> tuple[int, Any]:
    name = call.query.get("name")
    found = [
        api.shown_artifact(each)
        for each in sorted(api.artifacts.values(), key=lambda each: -each.id)
        if each.run_id == call.number("run_id") and name in {None, each.name}
    ]
    return 200, {"total_count": len(found), "artifacts": found}


@_route("get", f"{R}/actions/artifacts/{{artifact_id}}")
def _get_artifact(api: GitHubApi, call: Call) -> tuple[int, Any]:
    return 200, api.shown_artifact(api.found(api.artifacts, call.number("artifact_id")))


@_route("get", f"{R}/actions/artifacts/{{artifact_id}}/{{archive_format}}")
def _download_artifact(api: GitHubApi, call: Call) -> tuple[int, Any]:
    artifact = api.found(api.artifacts, call.number("artifact_id"))
    if artifact.expired:
        raise AnswerError(410, "Artifact has expired")
    return 302, f"{api.blob_url}/{artifact.id}?sig=secret-of-the-storage"


def _shown_run(api: GitHubApi, number: int) -> dict[str, Any]:
    whole = api.contract.example("workflow-run")
    shown: dict[str, Any] = whole | {"id": number} | api.runs[number]
    # The event of a run says less of a repository than the API does.
    if shown.get("head_repository"):
        shown["head_repository"] = whole["head_repository"] | shown["head_repository"]
    return shown


@_route("get", f"{R}/actions/runs/{{run_id}}")
def _get_run(api: GitHubApi, call: Call) -> tuple[int, Any]:
    api.found(api.runs, call.number("run_id"))
    return 200, _shown_run(api, call.number("run_id"))


@_route("get", f"{R}/actions/workflows/{{workflow_id}}/runs")
def _list_runs_of_workflow(api: GitHubApi, call: Call) -> tuple[int, Any]:
    file = f".github/workflows/{call.operation.path['workflow_id']}"
    branch = call.query.get("branch")
    every = [_shown_run(api, number) for number in sorted(api.runs, reverse=True)]
    of_file = [each for each in every if str(each["path"]).partition("@")[0] == file]
    if not of_file and file not in api.workflows:
        raise AnswerError(404, "Not Found")
    found = [each for each in of_file if branch in {None, each["head_branch"]}]
    return 200, {"total_count": len(found), "workflow_runs": found}


@_route("get", f"{R}/actions/runs")
def _list_runs(api: GitHubApi, call: Call) -> tuple[int, Any]:
    wanted = call.query.get("status")
    found = [
        api.contract.example("workflow-run") | {"id": number} | run
        for number, run in sorted(api.runs.items(), reverse=True)
        if wanted in {None, run.get("status"), run.get("conclusion")}
    ]
    return 200, {"total_count": len(found), "workflow_runs": found}


@_route("get", f"{R}/actions/runs/{{run_id}}/jobs")
def _list_jobs(api: GitHubApi, call: Call) -> tuple[int, Any]:
    base = api.contract.example("job")
    found = [
        base | {"run_id": call.number("run_id")} | job for job in api.jobs[call.number("run_id")]
    ]
    return 200, {"total_count": len(found), "jobs": found}


@_route("get", f"{R}/actions/workflows")
def _list_workflows(api: GitHubApi, _call: Call) -> tuple[int, Any]:
    base = api.contract.example("workflow")
    found = [base | {"path": path, "state": state} for path, state in api.workflows.items()]
    return 200, {"total_count": len(found), "workflows": found}


@_route("get", f"{R}/actions/runners")
def _list_runners(api: GitHubApi, call: Call) -> tuple[int, Any]:
    if call.token.login == ACTIONS:
        raise AnswerError(403, "Resource not accessible by integration")
    mine = {number for group in api.settings.groups or () for number in group["runners"]}
    found = [api.shown_runner(number) for number in api.runners if number not in mine]
    return 200, {"total_count": len(found), "runners": found}


@_route("get", f"{R}/actions/runners/deprecations/{{version}}")
def _get_deprecation(api: GitHubApi, call: Call) -> tuple[int, Any]:
    version = call.operation.path["version"]
    if version not in api.deprecations:
        raise AnswerError(404, "Not Found")
    return 200, api.deprecations[version]


@_route("post", f"{R}/actions/workflows/{{workflow_id}}/dispatches")
def _dispatch_workflow(api: GitHubApi, call: Call) -> tuple[int, Any]:
    api.dispatched.append({"workflow": call.operation.path["workflow_id"], **call.body})
    return 204, None


@_route("post", f"{R}/dispatches")
def _dispatch(api: GitHubApi, call: Call) -> tuple[int, Any]:
    api.dispatched.append(call.body)
    return 204, None


# --- git


def _branch_ref(call: Call) -> str:
    return f"refs/{call.operation.path['ref']}"


@_route("get", f"{R}/git/ref/{{ref}}")
def _get_ref(api: GitHubApi, call: Call) -> tuple[int, Any]:
    sha = api.git.resolve(_branch_ref(call))
    if sha is None:
        raise AnswerError(404, "Not Found")
    return 200, api.shown_ref(_branch_ref(call), sha)


@_route("post", f"{R}/git/refs")
def _make_ref(api: GitHubApi, call: Call) -> tuple[int, Any]:
    ref, sha = call.body["ref"], call.body["sha"]
    if not re.fullmatch(r"refs/[^/]+/.+", ref):
        raise AnswerError(422, "Reference name must contain at least three slashes.")
    if api.git.resolve(ref):
        raise AnswerError(422, "Reference already exists")
    if api.git.resolve(f"{sha}^{{commit}}") is None:
        raise AnswerError(422, "Object does not exist")
    api.git.git("update-ref", ref, sha)
    return 201, api.shown_ref(ref, sha)


@_route("patch", f"{R}/git/refs/{{ref}}")
def _move_ref(api: GitHubApi, call: Call) -> tuple[int, Any]:
    ref, sha = _branch_ref(call), call.body["sha"]
    there = api.git.resolve(ref)
    if there is None:
        raise AnswerError(422, "Reference does not exist")
    if api.git.resolve(f"{sha}^{{commit}}") is None:
        raise AnswerError(422, "Object does not exist")
    if not call.body.get("force") and not api.git.is_forward(there, sha):
        raise AnswerError(422, "Update is not a fast forward")
    api.git.git("update-ref", ref, sha)
    return 200, api.shown_ref(ref, sha)


@_route("delete", f"{R}/git/refs/{{ref}}")
def _remove_ref(api: GitHubApi, call: Call) -> tuple[int, Any]:
    ref = _branch_ref(call)
    if api.git.resolve(ref) is None:
        raise AnswerError(422, "Reference does not exist")
    for number, pull in api.pulls.items():
        if f"refs/heads/{pull['head']}" == ref and pull["state"] == "open":
            api.close_pull(number)
    api.git.git("update-ref", "-d", ref)
    return 204, None


@_route("post", f"{R}/git/blobs")
def _make_blob(api: GitHubApi, call: Call) -> tuple[int, Any]:
    text = call.body["content"]
    data = base64.b64decode(text) if call.body.get("encoding") == "base64" else text.encode()
    return 201, api.contract.example("short-blob") | {"sha": api.git.blob(data)}


@_route("get", f"{R}/git/blobs/{{file_sha}}")
def _get_blob(api: GitHubApi, call: Call) -> tuple[int, Any]:
    sha = call.operation.path["file_sha"]
    if api.git.resolve(f"{sha}^{{blob}}") != sha:
        raise AnswerError(404, "Not Found")
    data = api.git.git("cat-file", "blob", sha)
    return 200, api.contract.example("blob") | {
        "sha": sha,
        "size": len(data),
        "encoding": "base64",
        "content": base64.encodebytes(data).decode(),
    }


@_route("post", f"{R}/git/trees")
def _make_tree(api: GitHubApi, call: Call) -> tuple[int, Any]:
    entries: dict[str, str | None] = {}
    texts: dict[str, bytes] = {}
    for each in call.body["tree"]:
        if ("content" in each) == ("sha" in each):
            raise AnswerError(422, "Must supply either tree.sha or tree.content")
        if "content" in each:
            texts[each["path"]] = each["content"].encode()
        else:
            if each["sha"] and api.git.resolve(f"{each['sha']}^{{blob}}") is None:
                raise AnswerError(422, "tree.sha is not a valid blob")
            entries[each["path"]] = each["sha"]
    entries |= zip(texts, api.git.blobs(list(texts.values())), strict=True)
    sha = api.git.tree(call.body.get("base_tree"), entries)
    return 201, _shown_tree(api, sha, recursive=False)


@_route("get", f"{R}/git/trees/{{tree_sha}}")
def _get_tree(api: GitHubApi, call: Call) -> tuple[int, Any]:
    sha = api.git.resolve(f"{call.operation.path['tree_sha']}^{{tree}}")
    if sha is None:
        raise AnswerError(404, "Not Found")
    return 200, _shown_tree(api, sha, recursive="recursive" in call.query)


def _shown_tree(api: GitHubApi, sha: str, *, recursive: bool) -> dict[str, Any]:
    arguments = ["-r", "-t"] if recursive else []
    entries = []
    for line in api.git.git("ls-tree", "-z", *arguments, sha).decode().split("\0"):
        if line:
            facts, _, path = line.partition("\t")
            mode, kind, blob = facts.split()
            entries.append({"path": path, "mode": mode, "type": kind, "sha": blob})
    return api.contract.example("git-tree") | {"sha": sha, "tree": entries, "truncated": False}


@_route("post", f"{R}/git/commits")
def _make_commit(api: GitHubApi, call: Call) -> tuple[int, Any]:
    tree = call.body["tree"]
    if api.git.resolve(f"{tree}^{{tree}}") != tree:
        raise AnswerError(422, "Tree SHA does not exist")
    sha = api.git.commit_tree(
        tree, call.body.get("parents", []), call.body["message"], author=call.token.login
    )
    return 201, api.shown_commit(sha)


@_route("get", f"{R}/git/commits/{{commit_sha}}")
def _get_commit(api: GitHubApi, call: Call) -> tuple[int, Any]:
    return 200, api.shown_commit(call.operation.path["commit_sha"])


@_route("get", f"{R}/compare/{{base}}...{{head}}")
def _compare(api: GitHubApi, call: Call) -> tuple[int, Any]:
    base, head = call.operation.path["base"], call.operation.path["head"]
    if not api.git.resolve(f"{base}^{{commit}}") or not api.git.resolve(f"{head}^{{commit}}"):
        raise AnswerError(404, "Not Found")
    made = api.contract.example("commit-comparison")
    shown = made["commits"][0]
    commits = []
    for sha in api.git.text("rev-list", "--reverse", f"{base}..{head}").split():
        form = "%an%x00%cn%x00%P%x00%T%x00%B"
        told = api.git.git("show", "-s", f"--format={form}", sha).decode()
        author, committer, parents, tree, message = told.split("\0")
        commits.append(
            shown
            | {
                "sha": sha,
                "commit": shown["commit"]
                | {
                    "message": message.rstrip("\n"),
                    "tree": shown["commit"]["tree"] | {"sha": tree},
                },
                "author": api.user(author),
                # What GitHub signs for a bot, it commits itself.
                "committer": api.user("web-flow" if committer == "GitHub" else committer),
                "parents": [shown["parents"][0] | {"sha": each} for each in parents.split()],
            }
        )
    behind = api.git.text("rev-list", "--count", f"{head}..{base}")
    return 200, made | {
        "status": "ahead" if commits else "identical",
        "ahead_by": len(commits),
        "behind_by": int(behind),
        "total_commits": len(commits),
        "commits": commits[-250:],
        "merge_base_commit": shown | {"sha": api.git.text("merge-base", base, head)},
        "files": [],
    }


@_route("get", f"{R}/contents/{{path}}")
def _get_contents(api: GitHubApi, call: Call) -> tuple[int, Any]:
    path, ref = call.operation.path["path"], call.query.get("ref", api.default_branch)
    sha = api.git.resolve(f"{ref}:{path}")
    if sha is None or api.git.text("cat-file", "-t", sha) != "blob":
        raise AnswerError(404, "Not Found")
    data = api.git.git("cat-file", "blob", sha)
    small = len(data) <= 1 << 20
    return 200, api.contract.example("content-file-response-if-content-is-a-file") | {
        "type": "file",
        "path": path,
        "name": path.rpartition("/")[2],
        "sha": sha,
        "size": len(data),
        "encoding": "base64" if small else "none",
        "content": base64.encodebytes(data).decode() if small else "",
    }


@_route("post", f"{R}/releases")
def _make_release(api: GitHubApi, call: Call) -> tuple[int, Any]:
    if any(each["tag_name"] == call.body["tag_name"] for each in api.releases.values()):
        raise AnswerError(422, "Validation Failed", errors=[{"code": "already_exists"}])
    made = api._id()
    api.releases[made] = {"id": made, **call.body}
    return 201, api.contract.example("release") | api.releases[made]


@_route("get", f"{R}/releases/tags/{{tag}}")
def _get_release(api: GitHubApi, call: Call) -> tuple[int, Any]:
    for each in api.releases.values():
        if each["tag_name"] == call.operation.path["tag"]:
            return 200, api.contract.example("release") | each
    raise AnswerError(404, "Not Found")


@_route("get", "/user")
def _get_user(api: GitHubApi, call: Call) -> tuple[int, Any]:
    if call.token.is_bot:
        raise AnswerError(403, "Resource not accessible by integration")
    answer = call.operation.spec["responses"]["200"]["content"]["application/json"]
    shown = api.contract.resolved(next(iter(answer["examples"].values())))["value"]
    return 200, shown | {"login": call.token.login}


# --- the servers


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    api: GitHubApi
    stopped: threading.Event

    def handle_error(self, *_: Any) -> None:
        """Say nothing: connections break here on purpose."""


def _serve(api: GitHubApi, handler: type[BaseHTTPRequestHandler], port: int) -> _Server:
    server = _Server(("127.0.0.1", port), handler)
    server.api = api
    server.stopped = threading.Event()
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    return server


class _Base(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def give(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        """Write an answer; half of it if it is cut."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.break_off(reset=False)

    def break_off(self, *, reset: bool = True) -> None:
        """End the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            if reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.shutdown(socket.SHUT_RDWR)


class _ApiHandler(_Base):
    _PAGE: ClassVar[bytes] = b"<!DOCTYPE html><html><title>Log in</title></html>"

    def _handle(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        api, parts = self.server.api, urlsplit(self.path)
        if parts.path.startswith("/_stand-in/"):
            self._control(parts.path, dict(parse_qsl(parts.query)), data)
            return
        base = f"http://{self.headers.get('Host')}{api.base_path}"
        try:
            body = json.loads(data) if data else None
        except ValueError:
            body = None
        headers = {name.lower(): value for name, value in self.headers.items()}
        path = parts.path.removeprefix(api.base_path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        seen = Seen(self.command, path, query, body, headers)
        if not parts.path.startswith(api.base_path):
            api.violated(f"{seen}: not below {api.base_path}")
        fault = api.arrived(seen)
        try:
            self._answer(seen, fault, parts.query, data, base)
        finally:
            if api.state_file:
                api.state_file.write_text(json.dumps(api.state(), indent=1), encoding="utf-8")

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

    def _answer(
        self, seen: Seen, fault: Fault | None, raw_query: str, data: bytes, base: str
    ) -> None:
        kind = fault.kind if fault else None
        if fault and kind == "refuse":
            self.break_off()
            return
        if fault and kind == "hang":
            self.server.stopped.wait(fault.pause_s)
            self.break_off()
            return
        if fault and kind in {"status", "html"}:
            seen.status = 200 if kind == "html" else fault.status
            body = (
                self._PAGE
                if kind == "html"
                else json.dumps({} if fault.body is None else fault.body).encode()
            )
            kind_of = "text/html" if kind == "html" else "application/json"
            self.give(seen.status, body, {"Content-Type": kind_of, **fault.headers})
            return
        if fault and kind == "slow":
            time.sleep(fault.pause_s)
        status, value, headers = self.server.api.answer(seen, raw_query, data, base)
        if kind == "lose":
            self.break_off()
            return
        seen.status = status
        body = b"" if value is None else json.dumps(value).encode()
        headers |= {"X-RateLimit-Limit": "1000", "X-RateLimit-Remaining": "900"}
        if body:
            headers["Content-Type"] = "application/json; charset=utf-8"
        if seen.method == "GET" and status == 200:
            headers["ETag"] = f'W/"{hashlib.sha256(body).hexdigest()}"'
            if seen.headers.get("if-none-match") == headers["ETag"]:
                seen.status = 304
                self.send_response(304)
                for name, text in headers.items():
                    self.send_header(name, text)
                self.end_headers()
                return
        self.give(status, body, headers, cut=kind == "cut")

    def _control(self, path: str, query: dict[str, str], data: bytes) -> None:
        api = self.server.api
        if self.command == "PUT" and path.startswith("/_stand-in/artifacts/"):
            name = path.removeprefix("/_stand-in/artifacts/")
            made = api.add_artifact(int(query["run"]), name, data)
            self.give(201, json.dumps({"id": made}).encode(), {})
        else:
            self.give(200, json.dumps(api.state()).encode(), {"Content-Type": "application/json"})


class _BlobHandler(_Base):
    """The storage behind artifacts: it knows signatures, and no token."""

    def do_GET(self) -> None:
        api, parts = self.server.api, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen("GET", f"/storage{parts.path}", dict(parse_qsl(parts.query)), None, headers)
        fault = api.arrived(seen)
        if "authorization" in headers:
            api.violated("the token was sent to the storage")
            self.give(400, b"only one auth mechanism allowed", {})
            return
        if fault and fault.kind in {"refuse", "lose"}:
            self.break_off()
            return
        if fault and fault.kind == "hang":
            self.server.stopped.wait(fault.pause_s)
            self.break_off()
            return
        if fault and fault.kind == "status":
            seen.status = fault.status
            self.give(fault.status, b"", fault.headers)
            return
        artifact = api.artifacts.get(int(parts.path.strip("/")))
        seen.status = 200 if artifact else 404
        self.give(
            seen.status,
            artifact.data if artifact else b"",
            {"Content-Type": "application/zip"},
            cut=bool(fault and fault.kind == "cut"),
        )


def main(argv: list[str]) -> None:
    """Serve until the process is ended; see the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repository", default="octo/fleet")
    parser.add_argument("--git", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--base-path", default="")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--pulls", type=json.loads, default=[], help="a list of add_pull's options")
    options = parser.parse_args(argv)
    api = GitHubApi(
        options.git,
        repository=options.repository,
        base_path=options.base_path,
        port=options.port,
        contract=load(node_tools.npm_file(node_tools.OPENAPI)),
    )
    for each in options.pulls:
        api.add_pull(**each)
    api.state_file = options.state
    sys.stdout.write(f"{api.url}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1:])
