"""What tests of the GitHub client share: a repository to copy, a clock that does not wait."""

from __future__ import annotations

import functools
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from github_api import GitHubApi
from github_git import BareRepository

from pipelines.github.client import GitHub

if TYPE_CHECKING:
    from collections.abc import Iterator

PARAMS = "models:\n  tiny-llama: {}\n"
NEW_PARAMS = "models:\n  tiny-llama: {context_tokens: 512}\n"


class Clock:
    """Time that passes only by waiting."""

    def __init__(self) -> None:
        """Begin at zero."""
        self.now_s = 0.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        """Tell the time."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.waited.append(seconds)
        self.now_s += seconds


def client(api: GitHubApi, clock: Clock | None = None, **options: Any) -> GitHub:
    """
    Return a client of a stand-in, whose waits take no time.

    A busy machine answers late, and late is not never: who plants a silence says how long it lasts.
    """
    clock = clock or Clock()
    token = options.pop("token", api.token)
    chosen: dict[str, Any] = {
        "answer_within_s": 20.0,
        "sleep": clock.sleep,
        "clock": clock,
    } | options
    return GitHub(api.repository, token, api_url=api.url, **chosen)


def patient_client(api: GitHubApi) -> GitHub:
    """Return a client that lives in real time, among many on a busy machine."""
    return GitHub(api.repository, api.token, api_url=api.url)


@functools.cache
def _template() -> Path:
    """A repository with `main`, and a branch `feature` one commit ahead; made once a process."""
    git = BareRepository.create(Path(tempfile.mkdtemp(prefix="fleet-git-")) / "o.git")
    main = git.commit("main", {"params.yaml": PARAMS, "results/m/old.json": "{}\n"})
    git.git("update-ref", "refs/heads/feature", main)
    git.commit("feature", {"params.yaml": NEW_PARAMS})
    shutil.rmtree(git.path / "hooks", ignore_errors=True)
    return git.path


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[GitHubApi]:
    """Serve a fresh copy of that repository; violations fail the test."""
    folder.mkdir(parents=True, exist_ok=True)
    git = folder / "o.git"
    if not git.exists():
        shutil.copytree(_template(), git)
    with GitHubApi(git, **options) as api:
        yield api
