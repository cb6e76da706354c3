"""
Register a runner for one job: `jit_register.py CONFIG ENVFILE`, as root.

The App's key signs a token of ten minutes (openssl), that one asks for a token of an hour which may
do nothing but `administration: write` on one repository, and that one for the configuration of a
runner that GitHub forgets after its first job. The configuration goes into ENVFILE, from which the
runner takes it as if it were an argument; a process list shows nothing.

The App of this key needs no other permission, and should be another one than that of the
workflows: whoever has it may register runners, and change the settings of the repository.

Sources: docs.github.com, "Generating a JSON Web Token (JWT) for a GitHub App", "Create
configuration for a just-in-time runner for a repository"; actions/runner: CommandSettings.cs reads
ACTIONS_RUNNER_INPUT_*.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Final

_ANSWER_WITHIN_S: Final = 30.0
_ANSWER_LIMIT_BYTES: Final = 1 << 20
# GitHub takes ten minutes at most, and forgives a clock that is a minute early.
_TOKEN_S: Final = 540
_EARLIER_S: Final = 60
_REPOSITORY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}/[A-Za-z0-9._-]{1,100}")
_ENCODED: Final = re.compile(r"[A-Za-z0-9+/=_-]{1,100000}")


class RefusedError(Exception):
    """There is no registration; the text says why."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: a token would go along."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Answer the redirect itself, which is an error."""


def main(argv: list[str]) -> int:
    """Write ENVFILE, or one line about why not."""
    try:
        config = _config(Path(argv[1]))
        encoded = register(config)
        target = Path(argv[2])
        target.unlink(missing_ok=True)
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"ACTIONS_RUNNER_INPUT_JITCONFIG={encoded}\n")
    except (RefusedError, OSError, IndexError) as error:
        print(f"No registration: {error}", file=sys.stderr)
        return 1
    return 0


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        good = (
            config["api_url"].startswith(("https://", "http://127.0.0.1:"))
            and _REPOSITORY.fullmatch(config["repository"])
            and all(isinstance(config[name], str) for name in ("client_id", "key", "name"))
            and config["labels"]
            and all(isinstance(label, str) for label in config["labels"])
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(f"{path} is not as jit.json has to be: {error!r}") from None
    if not good:
        raise RefusedError(f"{path} is not as jit.json has to be")
    found: dict[str, Any] = config
    return found


def register(config: dict[str, Any]) -> str:
    """
    Return the configuration of a runner for one job.

    Raises:
        RefusedError: GitHub does not give one.
    """
    repository = config["repository"]
    app = _jwt(config["client_id"], Path(config["key"]))
    installation = _ask(config, "GET", f"/repos/{repository}/installation", app)
    token = _ask(
        config,
        "POST",
        f"/app/installations/{int(installation['id'])}/access_tokens",
        app,
        {
            "repositories": [repository.partition("/")[2]],
            "permissions": {"administration": "write"},
        },
    )["token"]
    made = _ask(
        config,
        "POST",
        f"/repos/{repository}/actions/runners/generate-jitconfig",
        token,
        {
            # GitHub refuses a name that is taken: by the runner of before, for a moment.
            "name": f"{config['name']}-{secrets.token_hex(4)}",
            "runner_group_id": 1,
            "labels": config["labels"],
            "work_folder": "_work",
        },
    )
    encoded = made.get("encoded_jit_config")
    if not isinstance(encoded, str) or not _ENCODED.fullmatch(encoded):
        raise RefusedError("the answer holds no configuration")
    return encoded


def _jwt(client_id: str, key: Path) -> str:
    """Sign a token as the App (RS256)."""
    now = int(time.time())
    head = {"alg": "RS256", "typ": "JWT"}
    claims = {"iat": now - _EARLIER_S, "exp": now + _TOKEN_S, "iss": client_id}
    text = ".".join(_base64url(json.dumps(each).encode()) for each in (head, claims))
    done = subprocess.run(  # noqa: S603 - a list of words
        ["/usr/bin/openssl", "dgst", "-sha256", "-sign", str(key)],
        input=text.encode(),
        capture_output=True,
        timeout=_ANSWER_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise RefusedError(f"openssl cannot sign with {key}")
    return f"{text}.{_base64url(done.stdout)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _ask(
    config: dict[str, Any], method: str, path: str, token: str, body: object = None
) -> dict[str, Any]:
    """Ask GitHub once; systemd asks again."""
    request = urllib.request.Request(  # noqa: S310 - held to https by _config
        config["api_url"].rstrip("/") + path,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "User-Agent": "gguf-fleet",
            "X-GitHub-Api-Version": "2022-11-28",
        },
    )
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=_ANSWER_WITHIN_S) as answer:
            found = json.loads(answer.read(_ANSWER_LIMIT_BYTES))
    except urllib.error.HTTPError as error:
        raise RefusedError(f"{method} {path}: {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise RefusedError(f"{method} {path}: {type(error).__name__}") from None
    if not isinstance(found, dict):
        raise RefusedError(f"{method} {path}: no object")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv))
