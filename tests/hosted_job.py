"""A job of GitHub Actions in a checkout: what its runner sets, and the main that it is a run of."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest
    from github_api import GitHubApi
    from release_checkout import Checkout


class Hosted:
    """Files of a runner, a token, a commit of main."""

    def __init__(self, checkout: Checkout, api: GitHubApi, monkeypatch: pytest.MonkeyPatch) -> None:
        """Push what the checkout holds to main, and be a job of that commit."""
        self.checkout, self.api = checkout, api
        self.files = checkout.root.parent / "runner"
        self.files.mkdir()
        self._monkeypatch = monkeypatch
        for name, value in {**api.environment(), "GITHUB_ACTIONS": "true"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GITHUB_OUTPUT", str(self.files / "output"))
        monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(self.files / "summary"))
        monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
        monkeypatch.delenv("GITHUB_EVENT_PATH", raising=False)
        monkeypatch.delenv("GITHUB_EVENT_NAME", raising=False)
        self.run(1)
        self.push()

    def run(self, number: int) -> None:
        """Be another run."""
        self._monkeypatch.setenv("GITHUB_RUN_ID", str(number))

    def push(self) -> str:
        """Let main be what the checkout holds."""
        root = self.checkout.root
        kept: dict[str, str | bytes | None] = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for top in ("params.yaml", "dvc.yaml", "dvc.lock", "modelfiles", "results", "examples")
            for path in ([root / top] if (root / top).is_file() else (root / top).rglob("*"))
            if path.is_file()
        }
        return self.api.git.commit("main", kept)

    def clone(self, revision: str = "main") -> None:
        """Be a fresh checkout of a commit; registries are elsewhere and stay."""
        root = self.checkout.root
        for top in ("results", "modelfiles"):
            shutil.rmtree(root / top, ignore_errors=True)
        for name, data in self.api.git.files(revision).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)

    def outputs(self) -> dict[str, str]:
        """Read the outputs of the step; each only once."""
        path, told = self.files / "output", {}
        lines = path.read_text().splitlines()
        path.write_text("")
        while lines:
            name, _, frame = lines.pop(0).partition("<<")
            end = lines.index(frame)
            told[name] = "\n".join(lines[:end])
            lines = lines[end + 1 :]
        return told

    def summary(self) -> str:
        """Read the summary of the job; each only once."""
        path = self.files / "summary"
        text = path.read_text()
        path.write_text("")
        return text

    def open_pulls(self) -> list[dict[str, Any]]:
        """Return the open pull requests."""
        return [pull for pull in self.api.pulls.values() if pull["state"] == "open"]

    def merge(self) -> None:
        """Merge every open pull request."""
        for pull in self.open_pulls():
            self.api.close_pull(pull["number"], merge=True)
